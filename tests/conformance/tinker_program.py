"""What a user of Tinker's client writes, against the server of its first argument; prints what it saw.

The second argument is where torch is, which the client's environment needn't hold: losses of one's own are
differentiated on the client.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

sys.path.append(sys.argv[2])

import tinker
import torch
from tinker import types

URL = sys.argv[1]
MODEL = "coserve-demo"
service = tinker.ServiceClient(base_url=URL, api_key="tml-anything", user_metadata={"who": "test"})
rest = tinker.RestClient(base_url=URL, api_key="tml-anything")
TOKENS = [int(token) for token in sys.argv[3].split(",")]
PROMPT = types.ModelInput.from_ints(TOKENS[:6])
ADAM = types.AdamParams(learning_rate=2e-3)
GREEDY = types.SamplingParams(max_tokens=12, temperature=0.0)


def datum(tokens: list[int], weights: list[float] | None = None) -> types.Datum:
    weights = weights or [0.0] * 5 + [1.0] * (len(tokens) - 6)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def policy(tokens: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": logprobs,
            "advantages": [0.0] * 5 + [advantage] * (len(tokens) - 6),
        },
    )


def client(seed: int, **flags: bool) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=MODEL, rank=4, seed=seed, **flags).result()


def supervised() -> dict:
    """Passes and steps asked for together; the weights then answer as they learnt."""
    training = client(1)
    losses = []
    for _ in range(12):
        passed = training.forward_backward([datum(TOKENS)] * 2, "cross_entropy")
        stepped = training.optim_step(ADAM)
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    sampler = training.save_weights_and_get_sampling_client().result()
    learnt = sampler.sample(PROMPT, 1, GREEDY).result().sequences[0]
    base = service.create_sampling_client(base_model=MODEL).result()
    plain = base.sample(PROMPT, 1, GREEDY).result().sequences[0]
    return {"losses": losses, "learnt": learnt.tokens, "base": plain.tokens, "stop": learnt.stop_reason}


def chunks() -> dict:
    """More data than one request holds: the client sends two at once, the later one first."""
    training = client(2)
    many = [datum(TOKENS[:4], [float(n % 3)] * 3) for n in range(1030)]
    passed = training.forward(many, "cross_entropy").result()
    few = training.forward(many[:3], "cross_entropy").result()
    return {
        "count": len(passed.loss_fn_outputs),
        "loss": passed.metrics["loss:sum"],
        "expected": few.metrics["loss:sum"] * 343.0,
    }


def own_loss() -> dict:
    """A loss of one's own that is cross entropy gives its gradient, weights of either sign."""
    weights = [(-1.0) ** n * n / 7 for n in range(len(TOKENS) - 1)]
    norms, sums = [], []
    for own in (False, True):
        training = client(3)
        training.forward_backward([datum(TOKENS)], "cross_entropy").result()
        training.optim_step(ADAM).result()  # away from B = 0
        if own:

            def loss(data, logprobs):
                return -(logprobs[0] * torch.tensor(weights)).sum(), {"mine": 1.0}

            passed = training.forward_backward_custom([datum(TOKENS)], loss)
        else:
            passed = training.forward_backward([datum(TOKENS, weights)], "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=0.5))
        sums.append(passed.result().metrics["loss:sum"])
        norms.append(stepped.result().metrics["grad_norm:mean"])
    return {"norms": norms, "sums": sums}


def distributions() -> dict:
    """Eight targets a token, sent sparse, cost what eight passes with one each do."""
    training, n = client(3), len(TOKENS) - 1
    targets = torch.randint(2, 1000, (n, 8), generator=torch.Generator().manual_seed(1))
    weights = torch.zeros(n, 8)
    weights[5:, 0], weights[9:, 1], weights[:4, 2] = 0.75, -0.5, 0.25
    inputs = types.ModelInput.from_ints(TOKENS[:-1])
    wide = types.Datum(model_input=inputs, loss_fn_inputs={"target_tokens": targets, "weights": weights})
    narrow = [
        types.Datum(
            model_input=inputs,
            loss_fn_inputs={"target_tokens": targets[:, k].tolist(), "weights": weights[:, k].tolist()},
        )
        for k in range(8)
    ]
    both = [training.forward(data, "cross_entropy").result() for data in ([wide], narrow)]
    training.forward_backward([wide, narrow[0]], "cross_entropy").result()
    training.optim_step(ADAM).result()
    return {
        "sparse": wide.loss_fn_inputs["weights"].sparse_crow_indices is not None,
        "shape": both[0].loss_fn_outputs[0]["logprobs"].shape,
        "sums": [one.metrics["loss:sum"] for one in both],
        "after": training.forward([wide], "cross_entropy").result().metrics["loss:sum"],
    }


def reinforcement() -> dict:
    """Samples are scored in training as they were in sampling; ratios are 1, so losses are known."""
    training = client(4)
    training.forward_backward([datum(TOKENS)], "cross_entropy").result()
    training.optim_step(ADAM).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=10, temperature=1.0, seed=5)
    group = sampler.sample(PROMPT, 4, params, include_prompt_logprobs=True).result()
    prompt = [logprob for logprob in group.prompt_logprobs[1:]]
    data, sampled, scored = [], [], []
    for n, sequence in enumerate(group.sequences):
        logprobs = [*prompt, *sequence.logprobs]
        sampled += logprobs
        data.append(policy(TOKENS[:6] + sequence.tokens, logprobs, 1.0 - 0.5 * n))
    losses = {}
    for loss, config in {
        "importance_sampling": None,
        "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        "cispo": None,
        "dro": {"beta": 0.1},
    }.items():
        passed = training.forward_backward(data, loss, config).result()
        losses[loss] = passed.metrics["loss:sum"]
        scored = [float(x) for out in passed.loss_fn_outputs for x in out["logprobs"].data]
    training.optim_step(ADAM).result()
    whole = types.ModelInput.from_ints(TOKENS[:6] + group.sequences[0].tokens)
    again = sampler.compute_logprobs(whole).result()
    return {
        "lengths": [len(sequence.tokens) for sequence in group.sequences],
        "sampled": sampled,
        "scored": scored,
        "again": again[1:],
        "losses": losses,
    }


def states() -> dict:
    """Saved and loaded, with the optimizer and without."""
    training = client(5, train_unembed=False)
    for _ in range(2):
        training.forward_backward([datum(TOKENS)], "cross_entropy").result()
        training.optim_step(ADAM).result()
    path = training.save_state("two", user_metadata={"step": "2"}).result().path
    whole = service.create_training_client_from_state_with_optimizer(path).result()
    weights = service.create_training_client_from_state(path).result()
    after = {}
    for name, one in {"first": training, "whole": whole, "weights": weights}.items():
        one.forward_backward([datum(TOKENS)], "cross_entropy").result()
        one.optim_step(ADAM).result()
        after[name] = one.forward([datum(TOKENS)], "cross_entropy").result().metrics["loss:sum"]
    sampler_path = training.save_weights_for_sampler("for-chat").result().path
    saved = rest.list_checkpoints(training.model_id).result().checkpoints
    run = rest.get_training_run(training.model_id).result()
    info = rest.get_weights_info_by_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    expires = rest.list_checkpoints(training.model_id).result().checkpoints[-1].expires_at
    rest.delete_checkpoint_from_tinker_path(path).result()
    return {
        "after": after,
        "sampler_path": sampler_path,
        "saved": [one.checkpoint_id for one in saved],
        "left": [one.checkpoint_id for one in rest.list_checkpoints(training.model_id).result().checkpoints],
        "rank": [run.lora_rank, info.lora_rank, info.train_unembed],
        "expires": expires is not None,
        "listed": len(rest.list_training_runs().result().training_runs),
    }


def together() -> dict:
    """Two models trained at once come out as one after the other."""

    def train(seed: int) -> list[float]:
        training, losses = client(seed), []
        for _ in range(4):
            passed = training.forward_backward([datum(TOKENS)], "cross_entropy")
            stepped = training.optim_step(ADAM)
            losses.append(passed.result().metrics["loss:sum"])
            stepped.result()
        return losses

    alone = [train(6), train(7)]
    with ThreadPoolExecutor(2) as pool:
        return {"alone": alone, "together": list(pool.map(train, (6, 7)))}


def faults() -> dict:
    """What the client makes of refusals; the model goes on after them."""
    training, found = client(8), {}
    for name, work in {
        "loss": lambda: training.forward_backward([datum(TOKENS)], "nope"),
        "token": lambda: training.forward_backward([datum([5, 6, 10**6, 7, 8, 9, 9, 9])], "cross_entropy"),
        "load": lambda: service.create_training_client_from_state("tinker://a/weights/b"),
        "model": lambda: service.create_lora_training_client(base_model="gpt-9"),
    }.items():
        try:
            work().result()
        except tinker.APIStatusError as error:
            found[name] = [error.status_code, error.body["error"]["param"]]
    try:
        bad = datum(TOKENS, [3e38] * (len(TOKENS) - 1))
        training.forward_backward([bad], "cross_entropy").result()
        training.optim_step(ADAM).result()
    except tinker.RequestFailedError as error:
        found["gradient"] = str(error.category)
    found["loss:sum"] = training.forward([datum(TOKENS)], "cross_entropy").result().metrics["loss:sum"]
    return found


def main() -> None:
    models = [model.model_name for model in rest.get_server_capabilities().result().supported_models]
    info = client(9).get_info()
    seen: dict = {"models": models, "info": [info.model_data.model_name, info.lora_rank]}
    for part in (supervised, chunks, own_loss, distributions, reinforcement, states, together, faults):
        seen[part.__name__] = part()
    session = service.holder.get_session_id()
    seen["session"] = rest.get_session(session).result().user_metadata
    service.close("success").result()
    print(json.dumps(seen))


main()
