"""`python -m quern.api`: Gunicorn in a process whose metrics are shared by its workers from the first import on."""

from quern.api.server import serve
from quern.config import load
from quern.observe import logs

if __name__ == "__main__":
    settings = load()
    logs.configure("api", settings.log_level, settings.log_file)
    serve(settings)
