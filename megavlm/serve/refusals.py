"""What is not answered, in the form that OpenAI's clients understand."""

from typing import Any

GONE = 499
"""The client went away before its answer (nginx's number; nobody receives it)."""
RETRY_SECONDS = 2
SHUTTING_DOWN = "the server is shutting down; ask another, or again later"

KINDS = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}


class Refusal(Exception):  # noqa: N818 - an answer of the server, not a mistake in it
    """A request that is refused. Its message never quotes a prompt, a picture or a key."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        """status: of HTTP. param: the part of the request that is wrong."""
        super().__init__(message)
        self.status = status
        self._message, self._code, self._param = message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """JSON-safe."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self._message,
                "type": KINDS.get(self.status, kind),
                "param": self._param,
                "code": self._code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP asks for beside the status."""
        match self.status:
            case 401:
                return {"WWW-Authenticate": "Bearer"}
            case 429 | 503:
                return {"Retry-After": str(RETRY_SECONDS)}
            case 408:
                return {"Connection": "close"}
            case _:
                return {}


def out_of_time(seconds: int) -> Refusal:
    """For a request whose answer has not begun when it should have ended."""
    return Refusal(504, f"no room within {seconds} seconds; ask again later", code="timeout")
