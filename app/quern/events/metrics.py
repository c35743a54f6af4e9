"""What the waiting edge counts."""

from prometheus_client import Counter, Gauge

STREAMS = Gauge("quern_event_streams", "Clients that wait on a stream")
WATCHED = Gauge("quern_event_jobs_watched", "Jobs that at least one client follows")
SENT = Counter("quern_events_sent_total", "Events sent to clients")
REFUSED = Counter("quern_event_streams_refused_total", "Streams refused at a limit", ["limit"])
CUT = Counter("quern_event_streams_cut_total", "Clients cut off because they did not read")
LIVE = Gauge("quern_event_hub_live", "Whether the change stream is open")
BREAKS = Counter("quern_event_hub_breaks_total", "Times the change stream broke or could not be opened")
