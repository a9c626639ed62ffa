"""A model that is trained by calls: passes that add to its gradients, updates, saves and loads, in the order
in which they were asked for.

Passes that follow each other are one group, whose microbatches run under the scheduler as a job's do; a call
of another kind waits until those before it are over, and those behind wait for it. Other models and jobs run
all the while. Losses are sums, so gradients of several passes add up until an update takes them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from coserve.core.training_sequence import TrainingSequence
from coserve.errors import CoserveError, FailedPrecondition, InternalError
from coserve.layers.pieces import Pieces
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.peft_files import TENSOR_FILE
from coserve.models.decoder import Decoder
from coserve.training.activations import MicrobatchActivations
from coserve.training.batch_run import BatchRun, Trainee, check_fits
from coserve.training.called_pass import Part, PassUnderWay
from coserve.training.divergence import Diverged
from coserve.training.job import JobSpec
from coserve.training.microbatch import Microbatch
from coserve.training.model_calls import AdamParams, CallResult, Load, ModelCall, Pass, Save, Update
from coserve.training.optimizer import global_norm, make_optimizer
from coserve.training.policy_objectives import called_objective
from coserve.training.prefixes import longest_sharer
from coserve.training.saved_state import OPTIMIZER_FILE, read_manifest, write_state
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.training.unit_calls import never
from coserve.worker.kv_tensors import KVTensors

GROUP = 8  # microbatches at a time: making one takes some milliseconds, and a step waits for that

Outcome = CallResult | CoserveError


class CalledModel:
    """A model with the settings of `spec`, whose compute weights live in `rows` of the `pool`. `writer` reads
    and writes files beside the steps, `reply(call_id, outcome)` hears what came of a call.

    Raises InvalidRequest where the settings don't hold.
    """

    def __init__(
        self,
        spec: JobSpec,
        decoder: Decoder,
        pool: AdapterPool,
        rows: list[int],
        kv: KVTensors,
        writer: Executor,
        reply: Callable[[int, Outcome], None],
    ) -> None:
        self.spec = spec
        self.device_seconds = 0.0
        self._decoder, self._pool, self._rows, self._kv = decoder, pool, rows, kv
        self._writer, self._reply = writer, reply
        self._adapter = TrainableAdapter(
            spec.lora, decoder.config, spec.seed, base_model_name=spec.base_model_name, device=decoder.device
        )
        self._optimizer = make_optimizer(self._adapter, spec.training)
        self._adapter.place(pool, rows)
        self._longest_sharer = longest_sharer(decoder.config, dropout=0.0)
        self._calls: deque[tuple[int, ModelCall | PassUnderWay]] = deque()
        self._passes: list[PassUnderWay] = []  # begun, in order
        self._parts: list[Part] = []
        self._runs: dict[str, BatchRun] = {}  # by sequence id
        self._accumulated = False  # gradients of earlier groups are there
        self._trains = False  # the group under way adds to them
        self._kept = False  # they were kept within it
        self._changing: int | None = None  # the call of the file or the change below
        self._file: Future[Pieces[CallResult] | CallResult] | None = None
        self._change: Pieces[CallResult] | None = None  # an update, or a load, while it rests

    # ------------------------------------------------------------------ as a trainer

    @property
    def sequences(self) -> list[TrainingSequence]:
        """Of the group under way."""
        return [sequence for part in self._parts for sequence in part.run.sequences]

    @property
    def microbatches(self) -> dict[str, Microbatch]:
        """Of the group under way, by sequence id."""
        return {key: value for part in self._parts for key, value in part.run.microbatches.items()}

    @property
    def state_bytes(self) -> int:
        """Masters, gradients and moments."""
        return self._adapter.nbytes + self._optimizer.nbytes

    @property
    def workspace_bytes(self) -> int:
        """What the microbatches under way hold beside their activations."""
        return sum(part.run.workspace_bytes for part in self._parts)

    def place(self, sequence_id: str, extent: torch.Tensor, level: int) -> None:
        """Give a microbatch memory for its activations, uint8 of the `level`'s size."""
        self._runs[sequence_id].place(sequence_id, extent, level)

    def run_units(self, sequence: TrainingSequence, length: int, stop: Callable[[], bool] = never) -> bool:
        """Run the microbatch's next units as one call, or go on with it; whether it is done."""
        return self._runs[sequence.sequence_id].run_units(sequence, length, stop)

    def forget_activations(self, sequence_ids: set[str]) -> None:
        """Memory was taken away. Where no microbatch of the group counts as done any more, gradients are what
        they were before it; where all that aren't done lost theirs, what they were after the last one."""
        for part in self._parts:
            part.run.forget(sequence_ids & part.run.microbatches.keys())
        if sequence_ids == self._runs.keys():
            self._back_to_the_group()
        elif self._kept and all(s.sequence_id in sequence_ids for s in self.sequences if not s.done):
            self._adapter.restore_gradients()

    def keep_gradients(self) -> None:
        """A microbatch is done: requests that take the next one's memory don't take its work."""
        self._adapter.keep_gradients()
        self._kept = True

    def _back_to_the_group(self) -> None:
        if self._trains and self._accumulated:
            self._adapter.restore_gradients()
        elif self._trains:
            self._adapter.zero_gradients()

    # ------------------------------------------------------------------ calls

    @property
    def reads_or_writes(self) -> bool:
        """A file is being read or written for it."""
        return self._file is not None

    @property
    def is_idle(self) -> bool:
        """Nothing was asked of it that isn't done."""
        return not (self._calls or self._passes or self._file or self._change)

    def add(self, call_id: int, call: ModelCall) -> None:
        """Comes after all that was asked for before. FailedPrecondition for a pass that the pool will never
        hold."""
        item: ModelCall | PassUnderWay = call
        if isinstance(call, Pass):
            item = PassUnderWay(call_id, call, self._longest_sharer)
            self._check_fits(item.largest)
        self._calls.append((call_id, item))

    def _check_fits(self, tokens: int) -> None:
        decoder = self._decoder
        shape = decoder.config, decoder.config.num_layers, tokens, decoder.dtype, self._adapter.lowest_layer
        try:
            check_fits(self._kv.slabs_for(MicrobatchActivations.level_bytes(*shape)[0]), tokens, self._kv)
        except FailedPrecondition as error:
            raise FailedPrecondition(error.message, param="data", code=error.code) from None

    def go_on(self, stop: Callable[[], bool] = never) -> bool:
        """Do what can be done now; whether there are new `sequences`. An update or a load may rest after a
        piece because of `stop()`."""
        while True:
            if self.sequences:
                if not all(sequence.done for sequence in self.sequences):
                    return False
                self._end_group()
            if self._file is not None and not self._take_file():
                return False
            if self._change is not None and not self._go_on_changing(stop):
                return False
            if self._passes or (self._calls and isinstance(self._calls[0][1], PassUnderWay)):
                self._begin_group()
                if self.sequences:
                    return True
            elif not self._calls:
                return False
            else:
                self._begin_change(*self._calls.popleft())

    @property
    def is_changing(self) -> bool:
        """An update or a load rests."""
        return self._change is not None

    def wait_for_file(self, seconds: float) -> None:
        """Wait so long at most for what is read or written."""
        if self._file is not None:
            wait([self._file], seconds)

    def fail(self, error: CoserveError) -> None:
        """What is under way went wrong: its calls fail, the gradients are what they were before it."""
        for under_way in self._passes:
            self._reply(under_way.call_id, error)
        self._passes = []
        if self._changing is not None:
            self._file = self._change = None
            self._answer(error)
        self._forget_group()
        self._back_to_the_group()

    def close(self, error: CoserveError) -> None:
        """Fail all that was asked for; a file that is being written is finished."""
        self.fail(error)
        waiting, self._calls = self._calls, deque()
        for call_id, _ in waiting:
            self._reply(call_id, error)

    # ------------------------------------------------------------------ passes

    def _begin_group(self) -> None:
        """Microbatches of the passes that come next, as far as they follow each other."""
        room = GROUP - sum(self._begin_part(under_way, GROUP) for under_way in self._passes)
        while room > 0 and self._calls and isinstance(self._calls[0][1], PassUnderWay):
            _, under_way = self._calls.popleft()
            assert isinstance(under_way, PassUnderWay)
            self._passes.append(under_way)
            room -= self._begin_part(under_way, room)
        self._trains = any(part.owner.call.backward for part in self._parts)
        if self._trains:
            if self._accumulated:
                self._adapter.keep_gradients()
            else:
                self._adapter.zero_gradients()

    def _begin_part(self, under_way: PassUnderWay, room: int) -> int:
        """As many of its next microbatches as there is room for; how many they are."""
        packed = under_way.packed[under_way.begun : under_way.begun + room]
        samples = [[under_way.samples[i] for i in data.numbers] for data in packed]
        model_id, call = self.spec.job_id, under_way.call
        run = BatchRun(
            self._decoder,
            called_objective(call.loss, wide=under_way.is_wide),
            samples,
            name=f"{model_id}/{under_way.call_id}/{under_way.begun}",
            job_id=model_id,
            adapter=model_id,
            pool=self._pool,
            rows={model_id: self._rows},
            trainee=Trainee(self._adapter, self._pool, self._rows) if call.backward else None,
            shared=[data.shared for data in packed],
            summed=True,
            kv=self._kv,
        )
        for data, microbatch in zip(packed, run.microbatches.values(), strict=True):
            q_T = under_way.sampled(data)
            if q_T is not None:
                microbatch.reference_T.copy_(torch.from_numpy(q_T))
        under_way.begun += len(packed)
        self._parts.append(Part(under_way, packed, run))
        self._runs.update(dict.fromkeys(run.microbatches, run))
        return len(packed)

    def _end_group(self) -> None:
        for part in self._parts:
            part.owner.take(part.packed, part.run)
        self._accumulated = self._accumulated or self._trains
        self._forget_group()
        done = [p for p in self._passes if p.begun == len(p.packed)]
        self._passes = [p for p in self._passes if p.begun < len(p.packed)]
        for under_way in done:
            self._reply(under_way.call_id, under_way.result)

    def _forget_group(self) -> None:
        self._parts, self._runs, self._kept = [], {}, False

    # ------------------------------------------------------------------ updates and files

    def _begin_change(self, call_id: int, call: ModelCall | PassUnderWay) -> None:
        self._changing = call_id
        if isinstance(call, Update):
            self._change = self._update(call.adam)
        elif isinstance(call, Save):
            self._file = self._writer.submit(self._writing(call))
        elif isinstance(call, Load):
            self._file = self._writer.submit(partial(self._read, call))

    def _take_file(self) -> bool:
        assert self._file is not None
        if not self._file.done():
            return False
        done, self._file = self._file, None
        try:
            found = done.result()
        except CoserveError as error:
            self._answer(error)
        except OSError as error:
            reason = f"The weights can't be read or written: {error.strerror or error}."
            self._answer(InternalError(reason, code="storage_failed"))
        else:
            if isinstance(found, CallResult):
                self._answer(found)
            else:
                self._change = found
        return True

    def _go_on_changing(self, stop: Callable[[], bool]) -> bool:
        """Whether the change is over; else it rests."""
        change, self._change = self._change, None
        assert change is not None
        try:
            while True:
                next(change)
                if stop():
                    self._change = change
                    return False
        except StopIteration as end:
            self._answer(end.value)
        except CoserveError as error:
            self._answer(error)
        return True

    def _answer(self, outcome: Outcome) -> None:
        assert self._changing is not None
        call_id, self._changing = self._changing, None
        self._reply(call_id, outcome)

    def _update(self, adam: AdamParams) -> Pieces[CallResult]:
        """Clip, update, write the compute rows."""
        optimizer = self._optimizer
        optimizer.spec = replace(
            optimizer.spec,
            adam_beta1=adam.beta1,
            adam_beta2=adam.beta2,
            adam_epsilon=adam.eps,
            weight_decay=adam.weight_decay,
            max_grad_norm=adam.grad_clip_norm,
        )
        self._adapter.finish_gradients()
        yield
        try:
            norm = yield from optimizer.step_pieces(adam.learning_rate)
        except Diverged:
            self._drop_gradients()
            raise FailedPrecondition(
                "The gradient is not finite: the weights are unchanged, and the gradient is dropped. Look at "
                "the data, or lower the learning rate.",
                param="adam_params",
                code="training_diverged",
            ) from None
        self._drop_gradients()
        if not math.isfinite(global_norm(self._adapter.parameters)):
            raise FailedPrecondition(
                "The update overflows the weights; load a saved state and lower the learning rate.",
                param="adam_params.learning_rate",
                code="training_diverged",
            )
        yield
        yield from self._adapter.write_pieces(self._pool, self._rows)
        return CallResult(metrics={"grad_norm:mean": norm})

    def _drop_gradients(self) -> None:
        self._adapter.zero_gradients()
        self._accumulated = False

    def _writing(self, call: Save) -> Callable[[], CallResult]:
        """What writes the files. On a CPU it reads masters and moments where they lie: nothing that changes
        them begins before it is done."""
        masters = {name: tensor.detach().cpu() for name, tensor in self._adapter.tensors().items()}
        state = {name: tensor.cpu() for name, tensor in self._optimizer.state().items()}
        manifest = {"step_count": self._optimizer.step_count}
        config = dict(self._adapter.config)

        def write() -> CallResult:
            write_state(Path(call.directory), masters, config, state if call.optimizer else None, manifest)
            return CallResult()

        return write

    def _read(self, call: Load) -> Pieces[CallResult]:
        """Read the files; what it returns sets the weights."""
        directory = Path(call.directory)
        manifest = read_manifest(directory)
        if manifest is None:
            raise FailedPrecondition("The saved files are damaged.", param="path", code="damaged_state")
        if call.optimizer and OPTIMIZER_FILE not in manifest["sha256"]:
            raise FailedPrecondition(
                "These weights were saved without their optimizer's state.", param="optimizer"
            )
        weights = load_file(directory / TENSOR_FILE)
        state = load_file(directory / OPTIMIZER_FILE) if call.optimizer else None
        return self._set(weights, state, manifest["step_count"])

    def _set(
        self, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor] | None, step_count: int
    ) -> Pieces[CallResult]:
        self._adapter.load(weights)
        if state is not None:
            self._optimizer.load_state(state, step_count)
        else:
            self._optimizer = make_optimizer(self._adapter, self.spec.training)
        self._drop_gradients()
        yield
        yield from self._adapter.write_pieces(self._pool, self._rows)
        return CallResult()
