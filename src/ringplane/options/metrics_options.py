"""The options of metrics over TCP: the table `metrics` of the configuration file, or `--metrics`."""

from __future__ import annotations

from ringplane.options.addresses import ADDRESS, Address
from ringplane.options.declare import Options, option


class MetricsOptions(Options):
    """Where metrics are served."""

    listen: Address = option(
        ADDRESS,
        kw_only=False,
        flags=("--metrics",),
        help="Serve metrics for Prometheus (docs/metrics.md) over TCP; 9464 alone is 127.0.0.1:9464.",
        doc='the TCP address of the metrics, `"127.0.0.1:9464"` or `"[::1]:9464"`; `"9464"` is on 127.0.0.1',
        doc_default="required in this table",
    )
