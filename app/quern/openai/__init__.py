"""Requests in the shape of OpenAI's API, each a durable job; `docs/openai.md` says what is served."""
