"""Quern: a self-hosted, multi-tenant form backend with its own AI, on plain CPUs."""

import sys
from typing import Final

__version__: Final = "0.1.0"

# What libraries look for and Quern has no use for is told to be absent (None in `sys.modules` means that it cannot be
# imported) before they look: to find that pyOpenSSL is not installed, PyMongo loads all of cryptography.x509, 5 MB in
# each process; redis-py loads the metrics of OpenTelemetry, 1 MB, and ours are those of Prometheus.
for _absent in ("pymongo.pyopenssl_context", "opentelemetry.sdk.metrics"):
    sys.modules.setdefault(_absent, None)  # type: ignore[arg-type]  # typeshed knows modules only
