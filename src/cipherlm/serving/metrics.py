"""Figures of a running server, in Prometheus's format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# An evaluation takes from a fraction of a second (one small head) to an hour (a whole model).
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)


class Metrics:
    """The figures of one server. Labels have few values: never a name that a stranger chose."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cipherlm_requests", "HTTP requests", ["method", "route", "status"], registry=registry
        )
        self.evaluations = Counter(
            "cipherlm_evaluations", "Evaluations that ended, by how", ["outcome"], registry=registry
        )
        self.seconds = Histogram(
            "cipherlm_evaluation_seconds",
            "From evaluate to its result or error",
            buckets=_SECONDS,
            registry=registry,
        )
        self.bytes = Counter("cipherlm_session_bytes", "Bytes of messages", ["direction"], registry=registry)
        self.refreshes = Counter("cipherlm_refresh_rounds", "Refreshes asked for", registry=registry)
        self.sessions = Gauge("cipherlm_sessions", "Sessions that hold keys in memory", registry=registry)
        self.waiting = Gauge("cipherlm_queue", "Evaluations that wait", registry=registry)
        self.running = Gauge("cipherlm_running", "Evaluations that compute", registry=registry)
        self.key_bytes = Gauge("cipherlm_key_bytes", "Disk that keys take or are promised", registry=registry)

    def exposition(self) -> bytes:
        """Return all figures as text."""
        return generate_latest(self._registry)
