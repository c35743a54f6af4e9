"""`/v1`: requests in the shape of OpenAI's API, in the process that waits; docs/decisions/0002 says why all of it."""
