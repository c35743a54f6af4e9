"""Real services as child processes, for the demo, the tests and the benches; production uses the host's own.

Every service starts, is polled until it answers, can be killed and restarted on its data, and dies with its parent.
"""
