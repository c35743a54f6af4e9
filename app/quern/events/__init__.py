"""The waiting edge: one asyncio process for clients that wait (event streams now; long polls, streamed completions).

Why it is a process of its own: `docs/decisions/0001-what-waits.md`.
"""
