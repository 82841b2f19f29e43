"""`POST /v1/chat/completions` as OpenAI's clients call it, with one image.

A captioner follows no instructions: the text beside the image is not read.
"""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, ValidationError

from captioner.data.caption_formats import LOW_CONFIDENCE
from captioner.serving.answers import FAILURES, SafeJSON, describe_fault, flat_schema, refuse
from captioner.serving.service import Service
from captioner.serving.uploads import Options, Upload, read_base64


class ImageUrl(BaseModel):
    """The image, as a `data:` URL with base64."""

    url: str


class ImagePart(BaseModel):
    """The part of a message that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(BaseModel):
    """The part of a message that is text; it is not read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of the chat."""

    role: str
    content: str | list[Annotated[ImagePart | TextPart, Field(discriminator="type")]] | None = None


class ChatRequest(BaseModel):
    """A chat whose messages contain one image; options that are not listed are ignored."""

    model: str = "captioner"
    messages: list[Message] = Field(min_length=1, max_length=100)
    max_tokens: int | None = Field(None, ge=1, description="Longest caption in tokens; 256 at most.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same, by its newer name.")
    n: int | None = Field(None, ge=1, le=8, description="Captions, best first.")
    temperature: float | None = Field(
        None, ge=0, le=2, allow_inf_nan=False, description="Above 0, the caption is drawn at random."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Used where the temperature is above 0.")
    seed: int | None = Field(None, ge=0, lt=2**53, description="Used where the temperature is above 0.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events.")

    def options(self) -> Options:
        """Return the options of captioning."""
        options: dict[str, Any] = {"captions": self.n or 1}
        tokens = self.max_completion_tokens or self.max_tokens
        if tokens is not None:
            options["max_new_tokens"] = min(tokens, 256)
        if self.temperature:
            options |= {"sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0}
            options["seed"] = self.seed
        return Options.model_validate(options)

    def image(self) -> Upload:
        """Return the image.

        Raises:
            ValueError: there is no image, more than one, or it is not base64.
        """
        parts = [part for message in self.messages if isinstance(message.content, list) for part in message.content]
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(urls) != 1:
            raise ValueError(f"a captioner takes one image in the messages, not {len(urls)}")
        return Upload("image", read_base64(urls[0]))


def add_chat(app: FastAPI, service: Service, name: str) -> None:
    """Add the interface to an application.

    Args:
        app: the application.
        service: captions the images.
        name: name of the model.
    """

    @app.post(
        "/v1/chat/completions",
        summary="Caption one image as in a chat",
        response_class=SafeJSON,
        responses={code: FAILURES[code] for code in (400, 401, 404, 408, 413, 415, 422, 503)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": flat_schema(ChatRequest)}},
            }
        },
    )
    async def chat(request: Request) -> Any:
        """Answer a chat with the caption of its image. A captioner follows no instructions: text is not read."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise refuse(415, "send application/json")
        try:
            chat_request = ChatRequest.model_validate_json(await request.body(), strict=True)
            upload, options = chat_request.image(), chat_request.options()
        except ValidationError as error:
            unreadable = error.errors()[0]["type"] == "json_invalid"
            raise refuse(400 if unreadable else 422, describe_fault(error)) from None
        except ValueError as error:
            raise refuse(422, str(error)) from None
        if chat_request.model not in ("captioner", name):
            raise refuse(404, "there is no such model; /v1/models lists the models")
        [result] = await service.caption([upload], options)
        if result.error is not None and result.reason != LOW_CONFIDENCE:
            raise refuse(422, result.error)
        texts = [one.caption for one in result.best_first()]
        longest = options.max_new_tokens or service.captioner.model.generation_config.max_new_tokens or 0
        counts = [len(service.captioner.processor.tokenizer(text)["input_ids"]) for text in texts]
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        reasons = ["length" if longest and count >= longest else "stop" for count in counts]
        if chat_request.stream:
            return StreamingResponse(write_events(head, texts, reasons), media_type="text/event-stream")
        choices = [
            {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
            for n, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        usage = {"prompt_tokens": 0, "completion_tokens": sum(counts), "total_tokens": sum(counts)}
        return SafeJSON(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    @app.get("/v1/models", summary="List the model", response_class=SafeJSON, responses={401: FAILURES[401]})
    async def models() -> Any:
        """List the one model, for OpenAI's clients."""
        model = {"id": name, "object": "model", "created": 0, "owned_by": "captioner"}
        return SafeJSON({"object": "list", "data": [model]})


def write_events(head: dict[str, Any], texts: list[str], reasons: list[str]) -> Iterator[str]:
    """Write an answer as server-sent events: the text of each choice, the reason of its end, and a last event."""
    for number, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
        for delta, end in (({"role": "assistant", "content": text}, None), ({}, reason)):
            choice = {"index": number, "delta": delta, "finish_reason": end}
            event = head | {"object": "chat.completion.chunk", "choices": [choice]}
            yield f"data: {json.dumps(event)}\n\n"
    yield "data: [DONE]\n\n"
