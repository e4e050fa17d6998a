"""What a server counts, for Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one server. Thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def counter(name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"megavlm_{name}", meaning, labels, registry=self._registry)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"megavlm_{name}", meaning, registry=self._registry)

        def histogram(name: str, meaning: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"megavlm_{name}", meaning, buckets=bounds, registry=self._registry)

        self.requests = counter("requests", "By path and HTTP status", ("path", "status"))
        self.cancelled = counter("cancelled_requests", "Whose client went away")
        self.running = gauge("running_requests", "Answers that are being written")
        self.waiting = gauge("waiting_requests", "Requests that wait for room")
        self.prompt_tokens = counter("prompt_tokens", "Of the requests that were begun")
        self.generated_tokens = counter("generated_tokens", "Of answers")
        self.pictures_encoded = counter("pictures_encoded", "By the image encoder")
        self.pictures_reused = counter("pictures_reused", "Encoded before")
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From a whole request to its first token",
            FIRST_TOKEN_SECONDS,
        )
        self.next_token = histogram(
            "time_per_output_token_seconds", "Between tokens of an answer", TOKEN_SECONDS
        )

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
