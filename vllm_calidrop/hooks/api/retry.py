"""The 503 of a full pool: vLLM's error shape, and the header that says when to ask again. Imported when needed."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError


class PoolFullError(GracefulHTTPError):
    """An admission was refused because a pool is full. retry_after: seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)
        self.retry_after = retry_after


async def answer_pool_full(request: Any, error: PoolFullError) -> Any:
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    body = create_error_response(error)
    return JSONResponse(body.model_dump(), status_code=body.error.code, headers={"Retry-After": str(error.retry_after)})
