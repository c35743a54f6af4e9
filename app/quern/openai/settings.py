"""What the operator decides about the OpenAI-shaped API."""

from pydantic import BaseModel, Field


class OpenAISettings(BaseModel):
    """Durations are in seconds unless their name says otherwise, sizes in bytes."""

    max_body_bytes: int = Field(2_097_152, ge=1024, le=4 * 1_048_576, description="of a request other than a file")
    max_file_bytes: int = Field(33_554_432, ge=1024, le=512 * 1_048_576, description="of an uploaded file")
    max_batch_requests: int = Field(10_000, ge=1, le=50_000, description="lines of one batch")
    max_batches_per_tenant: int = Field(20, ge=1, le=1000, description="batches of one tenant that have not ended")
    max_answer_tokens: int = Field(1024, ge=1, le=65_536, description="of an answer whose request names no limit")
    max_waiting: int = Field(512, ge=1, le=100_000, description="clients that wait for an answer; over it: 429")
    max_waiting_per_tenant: int = Field(128, ge=1, le=100_000, description="of these, one tenant's; over it: 429")
    max_queued: int = Field(1000, ge=1, le=1_000_000, description="requests that wait in a queue; over it: 429")
    max_queued_per_tenant: int = Field(200, ge=1, le=1_000_000, description="of these, one tenant's; over it: 429")
    wait_seconds: float = Field(590.0, gt=0, le=3600, description="how long a client may wait for an answer")
    keep_minutes: int = Field(60, ge=1, le=1440, description="until an ended request that is not stored is forgotten")
    keep_stored_days: int = Field(30, ge=1, le=3650, description="until stored responses, files, batches are forgotten")
