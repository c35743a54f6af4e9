"""The engine: small models on a CPU, for many requests at once. Knows no MongoDB, no Redis and no network."""

import os

# ONNX Runtime reports its use to its makers unless it is told not to before it is loaded. Nothing leaves the machine.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
