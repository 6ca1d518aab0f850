"""What a server counts, for a Prometheus that asks."""

from collections.abc import Callable, Mapping
from typing import Any

from melcore.errors import ConfigError, MissingDependencyError

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counts nothing."""

    def ended(self, state: str, seconds: Mapping[str, float]) -> None:
        """Count an exam by what became of it, and the seconds that its parts took."""

    def spooled(self, count: int) -> None:
        """Count bytes of raw data on disk."""

    def unspooled(self) -> None:
        """Count an exam whose raw data did not fit the disk."""

    def close(self) -> None:
        """Answer no more."""


class PrometheusMetrics(Metrics):
    """Answers ``http://HOST:PORT/metrics``.

    Parameters
    ----------
    host, port
        Where; port 0 takes any that is free.
    gauges
        Name and words to a function that gives the value of the moment.

    Raises
    ------
    MissingDependencyError
        Without the package `prometheus_client`.
    ConfigError
        If the port is taken.
    """

    def __init__(self, host: str, port: int, gauges: Mapping[tuple[str, str], Callable[[], float]]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingDependencyError(
                "--metrics needs the package prometheus_client: pip install 'melcore[serve]'."
            ) from error
        registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._exams = prometheus.Counter("mel_exams", "Exams by what became of them", ["state"], registry=registry)
        self._seconds = prometheus.Histogram(
            "mel_exam_seconds", "Parts of an exam", ["part"], registry=registry, buckets=_SECONDS
        )
        self._spooled = prometheus.Counter("mel_spooled_bytes", "Raw data received and on disk", registry=registry)
        self._unspooled = prometheus.Counter(
            "mel_unspooled_exams", "Exams whose raw data did not fit the disk", registry=registry
        )
        for (name, words), value in gauges.items():
            prometheus.Gauge(name, words, registry=registry).set_function(value)
        try:
            self._server, self._thread = _listen(prometheus, port, host, registry)
        except OSError as error:
            raise ConfigError(f"the port {port} for --metrics cannot be used: {error.strerror}.") from error
        self.port: int = self._server.server_port

    def ended(self, state: str, seconds: Mapping[str, float]) -> None:
        """Count an exam."""
        self._exams.labels(state).inc()
        for part, value in seconds.items():
            self._seconds.labels(part).observe(value)

    def spooled(self, count: int) -> None:
        """Count bytes."""
        self._spooled.inc(count)

    def unspooled(self) -> None:
        """Count an exam whose raw data did not fit the disk."""
        self._unspooled.inc()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _listen(prometheus: Any, port: int, host: str, registry: Any) -> tuple[Any, Any]:
    server, thread = prometheus.start_http_server(port, addr=host, registry=registry)
    return server, thread
