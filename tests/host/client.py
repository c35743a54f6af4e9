"""HTTP and JSON by the standard library, as any integrator's client would be."""

import json
import ssl
import time
import urllib.request
import uuid
from typing import Any


class Client:
    """Calls the API with one key."""

    def __init__(self, url: str, key: str, trusting: ssl.SSLContext) -> None:
        self._url, self.key, self._trusting = url, key, trusting

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The decoded answer. Raises urllib.error.URLError."""
        content = json.dumps(body).encode() if body is not None else None
        return self._send(method, path, content, {"Content-Type": "application/json", **headers})

    def upload(self, path: str, name: str, content: bytes, **values: str) -> Any:
        """The decoded answer to a form with a file. Raises urllib.error.URLError."""
        mark = uuid.uuid4().hex
        part = f"--{mark}\r\nContent-Disposition: form-data; name="
        head = "".join(f'{part}"{key}"\r\n\r\n{value}\r\n' for key, value in values.items())
        head += f'{part}"file"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
        return self._send("POST", path, body, {"Content-Type": f"multipart/form-data; boundary={mark}"})

    def _send(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> Any:
        given = {"Authorization": f"Bearer {self.key}", **headers}
        request = urllib.request.Request(self._url + path, content, given, method=method)
        with urllib.request.urlopen(request, context=self._trusting, timeout=60) as answer:
            return json.load(answer)

    def form(self, name: str, **workflow: Any) -> str:
        """The identifier of a published form with one field, `comment`."""
        fields = [{"name": "comment", "type": "long_text", "max_length": 10_000, "required": True}]
        made = self.call("POST", "/api/v1/forms", {"name": name, "fields": fields, **workflow})
        self.call("POST", f"/api/v1/forms/{made['id']}/publish")
        return str(made["id"])

    def processed(self, response: str, patience_seconds: float) -> dict[str, Any]:
        """The response, once its workflow has ended."""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                found: dict[str, Any] = self.call("GET", f"/api/v1/responses/{response}")
                if found["status"] == "processed":
                    return found
            except OSError as error:
                # The database may just have been killed.
                found = {"error": str(error)}
            assert time.monotonic() < deadline, f"expected {response} to be processed, found {found}"
            time.sleep(0.5)
