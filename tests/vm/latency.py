"""How long the API takes to acknowledge a response, measured inside the guest. Reads `{key, form, count}` as JSON.

Runs in the guest: standard library only. Prints milliseconds.
"""

import http.client
import json
import ssl
import sys
import time


def main() -> None:
    asked = json.load(sys.stdin)
    trusting = ssl.create_default_context(cafile="/etc/quern/tls/authority.pem")
    headers = {"Authorization": "Bearer " + asked["key"], "Content-Type": "application/json"}
    body = json.dumps({"answers": {"comment": "How long does it take?"}})
    took, failed = [], 0
    connection = http.client.HTTPSConnection("127.0.0.1", 443, context=trusting, timeout=300)
    for number in range(asked["count"] + 10):
        began = time.monotonic()
        try:
            connection.request("POST", "/api/v1/forms/" + asked["form"] + "/responses", body, headers)
            answer = connection.getresponse()
            answer.read()
            failed += answer.status != 202
        except (OSError, http.client.HTTPException):
            failed += 1
            connection.close()
        # The first requests open connections and fill caches.
        if number >= 10:
            took.append((time.monotonic() - began) * 1000)
    took.sort()
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found = {name: round(took[min(len(took) - 1, int(len(took) * share))], 1) for name, share in shares.items()}
    print(json.dumps({**found, "failed": failed}))


if __name__ == "__main__":
    main()
