"""What the operator decides about waiting clients."""

from pydantic import BaseModel, Field


class EventSettings(BaseModel):
    """Durations are in seconds."""

    max_streams: int = Field(4000, ge=1, le=100_000, description="streams that one process holds; over it: 503")
    max_streams_per_tenant: int = Field(2000, ge=1, le=100_000, description="of these, one tenant's; over it: 429")
    heartbeat: float = Field(15.0, gt=0, le=300, description="the longest silence on a stream")
    send_timeout: float = Field(20.0, gt=0, le=300, description="how long a client may leave unread what it was sent")
    reauthenticate: float = Field(60.0, gt=0, le=3600, description="how long a revoked key can still follow a stream")
