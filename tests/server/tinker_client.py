"""Tinker's API as plain HTTP."""

from __future__ import annotations

from typing import Any

import httpx

from tests.server.running import BASE

LORA = {"rank": 4, "seed": 7}
DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}, {"tokens": [7]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [6, 7, 8], "dtype": "int64", "shape": [3]},
        "weights": {"data": [0.0, 1.0, -0.5], "dtype": "float32", "shape": [3]},
    },
}


class Tinker:
    """A session, and calls in it; `seq` counts the calls of the model made last."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session = self.ok("create_session", tags=[], user_metadata={"a": "b"}, sdk_version="0.38.0")[
            "session_id"
        ]
        self.models = self.samplers = self.seq = 0

    def post(self, route: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/api/v1/{route}", json=body)

    def ok(self, route: str, /, **body: Any) -> dict[str, Any]:
        response = self.post(route, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        response = self.http.get(f"/api/v1/{path}", params=params)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, route: str, /, **body: Any) -> dict[str, Any]:
        """The error of a request that is refused at once."""
        response = self.post(route, **body)
        assert response.status_code >= 400, response.text
        return {"status": response.status_code, **response.json()["error"]}

    def wait(self, answer: dict[str, Any]) -> dict[str, Any]:
        """What came of a call."""
        for _ in range(100):
            response = self.post("retrieve_future", request_id=answer["request_id"])
            if response.status_code != 408:
                assert response.status_code == 200, response.text
                return response.json()
        raise AssertionError("no answer")

    def create_model(self, **lora: Any) -> str:
        answer = self.ok(
            "create_model",
            session_id=self.session,
            model_seq_id=self.models,
            base_model=BASE,
            lora_config=LORA | lora,
        )
        self.models, self.seq = self.models + 1, 0
        made = self.wait(answer)
        assert made == {"type": "create_model", "model_id": answer["model_id"]}
        return answer["model_id"]

    def call(self, route: str, model: str, /, **body: Any) -> dict[str, Any]:
        """A call in its turn, and what came of it."""
        self.seq += 1
        return self.wait(self.ok(route, model_id=model, seq_id=self.seq, **body))

    def forward_backward(self, model_id: str, *data: dict[str, Any], loss: str = "cross_entropy") -> Any:
        given = {"data": list(data) or [DATUM], "loss_fn": loss}
        return self.call("forward_backward", model_id, forward_backward_input=given)

    def sample(self, **body: Any) -> dict[str, Any]:
        """The answer to a sample request."""
        body.setdefault("prompt", {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]})
        body.setdefault("sampling_params", {"max_tokens": 4})
        return self.wait(self.ok("asample", **body))
