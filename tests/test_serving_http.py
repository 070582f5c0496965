"""What clients of `piflux serve` meet, OpenAI's own first, before an engine without ranks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import re
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fake_engine import MODEL, FakeEngine, picture
from PIL import Image
from servers import PATIENCE_S, ask, get, post, served, until

from piflux.serving import Keys, Limits, build_app, logs
from piflux.serving.files import KEPT_S, Files
from piflux.serving.jobs import Refused
from piflux.serving.keys import WrongKeys, read_keys

DASHBOARD = Path(__file__).parent.parent / "docs" / "assets" / "grafana.json"
KEY = "a-key-that-nobody-guesses"
SMALL = Limits(json_bytes=20_000, upload_bytes=200_000, upload_pixels=300 * 300)


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    with served(build_app(engine, limits=SMALL)) as url:
        yield url, engine


@pytest.fixture
def engine(serving: tuple[str, FakeEngine]) -> FakeEngine:
    """The server's, as new."""
    serving[1].__init__()  # type: ignore[misc]
    return serving[1]


@pytest.fixture
def url(serving: tuple[str, FakeEngine], engine: FakeEngine) -> str:
    return serving[0]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def opened(b64: str | None) -> Any:
    assert b64 is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------ generations


def test_a_picture_is_that_of_its_seed_and_says_what_it_is(client, engine):
    made = client.images.generate(
        prompt="a dragon",
        model="demo",
        size="96x64",
        quality="high",
        user="ada",
        extra_body={
            "seed": 7,
            "negative_prompt": "fog",
            "num_inference_steps": 3,
            "guidance_scale": 2.5,
            "true_cfg_scale": 4,
            "lora": ["ink:0.5", "clay"],
            "deadline_s": 60,
        },
    )
    image = opened(made.data[0].b64_json)
    assert image.tobytes() == picture(7, (96, 64), "high").tobytes()
    assert (made.size, made.quality, made.output_format) == ("96x64", "high", "png")
    told = made.piflux
    assert (told["seeds"], told["policy"], told["lpips"]) == ([7], "rotate", 0.03)
    assert (told["steps"], told["computed"], told["ranks"]) == (3, 2, 2)
    assert image.text["prompt"] == "a dragon" and image.text["seed"] == "7"
    assert image.text["loras"] == "ink:0.5, clay:1" and image.text["quality"] == "high"
    (job,) = engine.seen
    assert job.loras == (("ink", 0.5), ("clay", 1.0))
    assert (job.negative, job.guidance, job.true_cfg, job.deadline_s) == ("fog", 2.5, 4.0, 60.0)
    assert job.user.endswith("/ada") and job.id == told["id"]


def test_pictures_have_seeds_in_a_row(client):
    made = client.images.generate(prompt="x", n=3, extra_body={"seed": 2**64 - 3})
    seeds = made.piflux["seeds"]
    assert seeds == [2**64 - 3, 2**64 - 2, 2**64 - 1]
    for seed, data in zip(seeds, made.data, strict=True):
        assert opened(data.b64_json).tobytes() == picture(seed, (64, 64)).tobytes()
    others = [client.images.generate(prompt="x").piflux["seeds"] for _ in range(2)]
    assert others[0] != others[1]


@pytest.mark.parametrize(
    "asked, promised",
    [
        (None, "medium"),
        ("auto", "medium"),
        ("standard", "medium"),
        ("hd", "lossless"),
        ("low", "low"),
    ],
)
def test_a_quality_is_a_promise(asked, promised):
    engine = FakeEngine()
    with served(build_app(engine, quality="medium")) as url:
        made = client_of(url).images.generate(prompt="x", **({"quality": asked} if asked else {}))
    assert made.quality == made.piflux["quality"] == engine.seen[0].quality == promised


def test_formats(client):
    exact = picture(5, (64, 64))
    made = {}
    for form, compression in (("webp", None), ("webp", 40), ("jpeg", None), ("jpeg", 10)):
        more = {} if compression is None else {"output_compression": compression}
        answer = client.images.generate(
            prompt="é", output_format=form, extra_body={"seed": 5}, **more
        )
        image = opened(answer.data[0].b64_json)
        assert image.format == form.upper() == answer.output_format.upper()
        assert json.loads(image.getexif()[0x010E])["prompt"] == "é"
        made[form, compression] = image, len(answer.data[0].b64_json)
    assert made["webp", None][0].convert("RGB").tobytes() == exact.tobytes()
    assert made["jpeg", 10][1] < made["jpeg", None][1]
    assert made["webp", 40][0].tobytes() != exact.tobytes()


def test_a_url_is_fetched_and_not_guessed(client, url):
    made = client.images.generate(prompt="x", n=2, response_format="url", extra_body={"seed": 1})
    for seed, data in enumerate(made.data, 1):
        assert data.b64_json is None and data.url.startswith(f"{url}/files/")
        assert len(data.url.rsplit("/", 1)[1]) > 32
        found = get(data.url)
        assert found.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(found.content)).tobytes() == picture(seed, (64, 64)).tobytes()
    assert get(f"{url}/files/other.png").status_code == 404


def test_kept_files_are_bounded_in_time_and_bytes():
    now = [0.0]
    files = Files(100, clock=lambda: now[0])
    first, second = files.keep(b"x" * 60, "png", ""), files.keep(b"y" * 60, "png", "")
    assert files.find(first) is None and files.find(second) is not None
    assert files.bytes == 60
    now[0] = KEPT_S + 1
    assert files.find(second) is None and files.bytes == 0


def test_events_lead_to_the_picture(client):
    asked = {"prompt": "x", "stream": True, "partial_images": 2, "extra_body": {"seed": 3}}
    events = list(client.images.generate(**asked))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == [
        *("queued", "progress", "partial_image", "progress", "partial_image"),
        *("progress", "progress", "completed"),
    ]
    progress = [event for event in events if event.type.endswith("progress")]
    assert [(event.step, event.steps) for event in progress] == [(i, 4) for i in (1, 2, 3, 4)]
    partial = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in partial] == [0, 1]
    preview = opened(partial[0].b64_json)
    assert preview.size == (8, 8) and partial[0].output_format == preview.format.lower()
    last = events[-1]
    assert opened(last.b64_json).tobytes() == picture(3, (64, 64)).tobytes()
    assert (last.quality, last.size, last.background) == ("lossless", "64x64", "opaque")
    assert last.piflux["policy"] == "gather"


def test_an_error_on_the_way_ends_the_events(client, engine):
    engine.fails = Refused(504, "deadline", "its deadline has passed")
    events = client.images.generate(prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="its deadline has passed") as raised:
        list(events)
    assert raised.value.code == "deadline"


# ------------------------------------------------------------------------------------------ edits


def test_pictures_are_edited(client, engine):
    source = picture(9, (64, 48))
    mask = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 48))
    made = client.images.edit(
        image=[("a.png", file_of(source)), ("b.webp", file_of(source, "WEBP", lossless=True))],
        mask=("mask.png", file_of(mask)),
        prompt="x",
        n=2,
        size="64x48",
        extra_body={"seed": 4, "lora": "ink"},
    )
    assert opened(made.data[1].b64_json).tobytes() == picture(5, (64, 48)).tobytes()
    (job,) = engine.seen
    assert [image.tobytes() for image in job.images] == [source.tobytes()] * 2
    assert job.mask.getpixel((5, 5)) == 255 and job.mask.getpixel((60, 5)) == 0
    assert job.seeds == (4, 5) and job.loras == (("ink", 1.0),)
    events = client.images.edit(image=file_of(source, "JPEG"), prompt="x", stream=True)
    assert [event.type for event in events][-1] == "image_edit.completed"


def test_a_mask_without_alpha_is_white_where_it_is_painted_anew(client, engine):
    mask = Image.linear_gradient("L").resize((16, 16))
    client.images.edit(image=file_of(picture(1, (16, 16))), mask=file_of(mask), prompt="x")
    assert engine.seen[0].mask.tobytes() == mask.tobytes()


def bomb() -> bytes:
    """A PNG of 46000 x 46000 pixels in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", 46_000, 46_000, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def moving() -> bytes:
    frames = [picture(i, (16, 16)) for i in range(2)]
    return file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:])


GOOD = file_of(picture(1, (64, 64)))


@pytest.mark.parametrize(
    "files, field, code",
    [
        ({"image": bomb()}, "image", "too_many_pixels"),
        ({"image": file_of(Image.new("1", (301, 300)))}, "image", "too_many_pixels"),
        ({"image": GOOD[:-60]}, "image", "invalid_image"),
        ({"image": b"GIF89a" + b"\0" * 50}, "image", "invalid_image"),
        ({"image": file_of(picture(1, (16, 16)), "TIFF")}, "image", "invalid_image"),
        ({"image": moving()}, "image", "invalid_image"),
        ({"image": b""}, "image", "invalid_image"),
        ({"image": GOOD, "mask": file_of(Image.new("L", (32, 64)))}, "mask", "invalid_value"),
        ({"image": [GOOD] * 5}, "image", "invalid_value"),
    ],
)
def test_pictures_that_are_not_taken(client, files, field, code):
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.edit(prompt="x", **files)
    assert (raised.value.param, raised.value.code) == (field, code)


def test_many_pictures_share_a_budget_of_pixels(client):
    side = file_of(Image.new("1", (200, 200)))
    with pytest.raises(openai.BadRequestError, match="together"):
        client.images.edit(prompt="x", image=[side, side, side])


def test_forms_that_are_not_taken(url):
    to = f"{url}/v1/images/edits"
    for sent, param in (
        ({"data": {"prompt": "x"}, "files": {"image": GOOD, "speed": b"x"}}, "speed"),
        ({"data": {"prompt": "x", "speed": "9"}, "files": {"image": GOOD}}, "speed"),
        ({"data": {"prompt": ["x", "y"]}, "files": {"image": GOOD}}, "prompt"),
        ({"data": {"prompt": "x", "n": "two"}, "files": {"image": GOOD}}, "n"),
        ({"data": {"prompt": "x", "image": "no file"}, "files": {"mask": GOOD}}, "image"),
        ({"data": {"prompt": "x"}, "files": {"mask": GOOD}}, "image"),
        ({"data": {"prompt": "x"}}, None),
    ):
        answer = post(to, **sent)
        assert answer.status_code == 400, sent
        assert answer.json()["error"]["param"] == param


def test_a_pipeline_without_pictures_takes_none():
    plain = replace(MODEL, edits=False, several=False, masks=False, negative=False, loras=())
    with served(build_app(FakeEngine(model=plain))) as url:
        client = client_of(url)
        with pytest.raises(openai.BadRequestError, match="FluxPipeline takes no pictures"):
            client.images.edit(prompt="x", image=GOOD)
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(prompt="x", extra_body={"negative_prompt": "y"})
        assert raised.value.param == "negative_prompt"
        assert client.models.retrieve("demo").piflux["images"] == 0


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "asked, param, code",
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 4001}, "prompt", "invalid_value"),
        ({"n": 5}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"size": "100x64"}, "size", "invalid_value"),
        ({"size": "0x64"}, "size", "invalid_value"),
        ({"size": "4112x64"}, "size", "invalid_value"),
        ({"size": "4096x4096"}, "size", "invalid_value"),
        ({"size": "large"}, "size", "invalid_value"),
        ({"quality": "xhigh"}, "quality", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"style": "vivid"}, "style", "unknown_parameter"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_value"),
        ({"partial_images": 2}, "partial_images", "invalid_value"),
        ({"stream": True, "response_format": "url"}, "response_format", "invalid_value"),
        ({"extra_body": {"seed": -1}}, "seed", "invalid_value"),
        ({"n": 2, "extra_body": {"seed": 2**64 - 1}}, "seed", "invalid_value"),
        ({"extra_body": {"num_inference_steps": 101}}, "num_inference_steps", "invalid_value"),
        ({"extra_body": {"guidance_scale": "5"}}, "guidance_scale", "invalid_value"),
        ({"extra_body": {"lora": "../secret"}}, "lora", "invalid_value"),
        ({"extra_body": {"lora": "ink:99"}}, "lora", "invalid_value"),
        ({"extra_body": {"lora": ["ink", "ink:0.5"]}}, "lora", "invalid_value"),
        ({"extra_body": {"lora": ["ink"] * 5}}, "lora", "invalid_value"),
        ({"extra_body": {"deadline_s": 0}}, "deadline_s", "invalid_value"),
        ({"extra_body": {"speed": 9}}, "speed", "unknown_parameter"),
        ({"extra_body": {"steps": 9}}, "num_inference_steps", "unknown_parameter"),
    ],
)
def test_what_is_wrong_is_named(client, engine, asked, param, code):
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(**{"prompt": "x", **asked})
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.type == "invalid_request_error"
    assert param in raised.value.message
    assert engine.seen == []


def test_another_model_is_not_found(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").piflux["qualities"]["lossless"] == "gather: exact"
    for call in (
        lambda: client.images.generate(prompt="x", model="gpt-image-2"),
        lambda: client.models.retrieve("black-forest-labs/FLUX.1-dev"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            call()
        assert raised.value.code == "model_not_found"


@pytest.mark.parametrize(
    "content, kind, code",
    [
        (b"{", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_json"),
        (b"[" * 19_000, "application/json", "invalid_json"),
        (b'{"prompt": "\\ud800"}', "application/json", "invalid_json"),
        (b"\xff\xfe", "application/json", "invalid_json"),
        (b'{"prompt": "x"}', "text/plain", "invalid_content_type"),
        (b"prompt=x", "application/x-www-form-urlencoded", "invalid_content_type"),
    ],
)
def test_bodies_that_are_no_request(url, content, kind, code):
    answer = post(f"{url}/v1/images/generations", content=content, headers={"content-type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code


def test_routes_that_are_none(url):
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/images/edits", 405)):
        answer = ask(method, url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_says_when_to_ask_again(client, engine):
    engine.room = 0
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as raised:
            client.images.generate(prompt="x", stream=stream)
        assert raised.value.response.headers["retry-after"] == "4"
        assert raised.value.code == "queue_full"


def test_a_failure_is_not_asked_for_again(url, engine):
    """OpenAI's client asks twice more after any other 500."""
    engine.fails = Refused(500, "lost_twice", "it has killed its ranks twice")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    with pytest.raises(openai.InternalServerError) as raised:
        client.images.generate(prompt="x")
    assert raised.value.code == "lost_twice"
    assert len(engine.seen) == 1


def test_an_error_of_our_own_is_logged_and_not_shown(client, engine, caplog):
    engine.fails = RuntimeError("the secret")
    with pytest.raises(openai.InternalServerError) as raised:
        client.images.generate(prompt="x", extra_headers={"x-request-id": "abc-1"})
    assert raised.value.code == "internal_error" and "abc-1" in raised.value.message
    assert "secret" not in raised.value.response.text
    (record,) = (record for record in caplog.records if record.exc_info)
    assert "the secret" in logs.Lines().format(record)


# ----------------------------------------------------------------------------- phases, and the end


def test_readiness_and_life(client, url, engine):
    def status(path: str) -> int:
        return get(url + path).status_code

    assert (status("/healthz"), status("/readyz")) == (200, 200)
    for phase, model, health, code in (
        ("starting", None, 200, "starting"),
        ("starting", MODEL, 200, "starting"),
        ("ending", MODEL, 200, "ending"),
        ("failed", MODEL, 503, "failed"),
    ):
        engine.phase, engine.model = phase, model
        assert (status("/healthz"), status("/readyz")) == (health, 503)
        with pytest.raises(openai.InternalServerError) as raised:
            client.images.generate(prompt="x")
        assert (raised.value.status_code, raised.value.code) == (503, code)
    assert engine.seen == []


def test_a_group_that_stands_still_is_not_alive(url, engine, monkeypatch):
    monkeypatch.setattr("piflux.serving.app.STUCK_S", -1.0)
    assert get(f"{url}/healthz").status_code == 503


def test_the_engine_ends_with_the_application():
    engine = FakeEngine()
    with served(build_app(engine)):
        assert not engine.ended
    assert engine.ended


def test_an_error_of_our_own_on_the_way_is_an_event(client, engine, caplog):
    engine.fails = RuntimeError("the secret")
    events = client.images.generate(prompt="x", stream=True)
    with pytest.raises(openai.APIError) as raised:
        list(events)
    assert raised.value.code == "internal_error" and "secret" not in str(raised.value.body)
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_job(url, engine, stream):
    before = metrics_of(url)
    engine.held_at = 0
    asyncio.run(_leave_once_it_is_drawn(url, engine, stream))
    until(lambda: engine.cancelled)
    assert engine.cancelled == [engine.seen[0].id]
    assert engine.state().drawing == 0
    until(lambda: metrics_of(url)["piflux_cancelled_total"] == before["piflux_cancelled_total"] + 1)
    gone = 'piflux_http_requests_total{code="499",method="POST",route="/v1/images/generations"}'
    until(lambda: metrics_of(url).get(gone) == before.get(gone, 0) + 1)


async def _leave_once_it_is_drawn(url: str, engine: FakeEngine, stream: bool) -> None:
    body = {"prompt": "x", "stream": stream}
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        asking = asyncio.ensure_future(client.post(f"{url}/v1/images/generations", json=body))
        while not engine.seen:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait((asking,))


def test_one_who_waits_and_goes_away_leaves_the_queue(url, engine):
    engine.held_at = 0
    asyncio.run(_two_of_which_one_leaves(url, engine))
    assert len(engine.seen) == 1 and len(engine.cancelled) == 1


async def _two_of_which_one_leaves(url: str, engine: FakeEngine) -> None:
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        draw = lambda: client.post(f"{url}/v1/images/generations", json={"prompt": "x"})  # noqa: E731
        first = asyncio.ensure_future(draw())
        while not engine.seen:
            await asyncio.sleep(0.01)
        second = asyncio.ensure_future(draw())
        while not engine.state().waiting:
            await asyncio.sleep(0.01)
        second.cancel()
        while engine.state().waiting:
            await asyncio.sleep(0.01)
        engine.held_at = None
        assert (await first).status_code == 200


def test_a_stream_that_waits_says_so(client, engine, url, monkeypatch):
    """Lest a proxy ends it."""
    monkeypatch.setattr("piflux.serving.clients.STREAM_BEAT_S", 0.02)
    engine.held_at, told = 2, []
    body = {"prompt": "x", "stream": True}
    with httpx2.stream(
        "POST", f"{url}/v1/images/generations", json=body, timeout=PATIENCE_S
    ) as answer:
        for line in answer.iter_lines():
            told.append(line)
            if told.count(": still here") == 4:
                engine.held_at = None
    assert told.count("event: image_generation.completed") == 1
    events = list(client.images.generate(prompt="x", stream=True))
    assert events[-1].type == "image_generation.completed"


# ----------------------------------------------------------------------------------------- safety


def test_keys():
    engine = FakeEngine()
    with served(build_app(engine, keys=Keys([KEY, "b" * 20]))) as url:
        for key in ("none", KEY + "x", KEY[:-1]):
            with pytest.raises(openai.AuthenticationError) as raised:
                client_of(url, key).images.generate(prompt="x")
            assert raised.value.code == "invalid_api_key"
        users = set()
        for key in (KEY, "b" * 20):
            client_of(url, key).images.generate(prompt="x", user="ada")
            users.add(engine.seen[-1].user)
        assert len(users) == 2 and not any(KEY in user for user in users)
        for path, status in (("/", 200), ("/healthz", 200), ("/metrics", 401), ("/v1/models", 401)):
            assert get(url + path).status_code == status
        made = client_of(url, KEY).images.generate(prompt="x", response_format="url")
        assert get(made.data[0].url).status_code == 200


def test_where_keys_are_read_from(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# Ada's\n{KEY}\n\n")
    keys = read_keys(file, {"PIFLUX_API_KEYS": f"{'b' * 20}, {'c' * 20}"})
    assert keys is not None and len(keys) == 3
    assert all(keys.holder(key) for key in (KEY, "b" * 20, "c" * 20))
    assert keys.holder("# Ada's") is None and keys.holder("") is None
    assert KEY not in repr(vars(keys))
    assert read_keys(None, {}) is None
    file.write_text("short\n")
    with pytest.raises(WrongKeys, match=f"{file}: API key 1 has 5 characters"):
        read_keys(file, {})
    with pytest.raises(WrongKeys, match=r"^PIFLUX_API_KEYS: API key 2 has 1 characters"):
        read_keys(None, {"PIFLUX_API_KEYS": f"{KEY},b"})
    file.write_text("# none\n")
    with pytest.raises(WrongKeys, match="holds no API key"):
        read_keys(file, {})
    with pytest.raises(WrongKeys, match="can't be read"):
        read_keys(tmp_path, {})


@pytest.fixture(scope="module")
def url_for_itself() -> Iterator[str]:
    with served(build_app(FakeEngine(), hosts={"127.0.0.1", "localhost"})) as url:
        yield url


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"host": "evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "none"}, 200),
    ],
)
def test_pages_of_strangers_do_not_reach_a_server_without_keys(url_for_itself, headers, status):
    """Neither by a name of their own for this host's address, nor by a form."""
    same = {"origin": url_for_itself} if not headers else {}
    for path in ("/v1/models", "/"):
        assert get(url_for_itself + path, headers=headers | same).status_code == status


def test_headers_that_make_answers_safe(url):
    page, api = get(f"{url}/"), get(f"{url}/v1/models")
    for answer in (page, api):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers or "piflux" not in answer.headers["server"]
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in api.headers


def test_large_bodies_are_not_read(url, engine):
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(50):
            yield b"x" * 1000

    kind = {"content-type": "application/json"}
    to = f"{url}/v1/images/generations"
    for content in (b"x" * 30_000, pieces()):
        answer = post(to, content=content, headers=kind)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
    answer = post(f"{url}/v1/images/edits", data={"prompt": "x"}, files={"image": b"x" * 300_000})
    assert answer.status_code == 413
    assert engine.seen == []


def test_a_body_that_trickles_is_not_waited_for():
    # A server of its own: on a busy machine whole bodies take that long as well.
    with served(build_app(FakeEngine(), limits=replace(SMALL, body_s=0.3))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as slow:
            slow.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


WHOLE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
REFUSED = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n"

DRAW = (
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


def test_connections_without_a_request_are_closed():
    """Whatever came before, and however often a byte comes: there is a time for the whole head."""
    engine, limits = FakeEngine(step_s=0.02), replace(SMALL, head_s=0.3)
    with served(build_app(engine, limits=limits), limits=limits) as url:
        host, port = url.removeprefix("http://").split(":")

        def answered(request: bytes) -> tuple[socket.socket, bytes]:
            """A connection on which this was answered; where we were too slow for it, the next."""
            while True:
                client = socket.create_connection((host, int(port)), timeout=60)
                with contextlib.suppress(ConnectionError):
                    client.sendall(request)
                    if answer := client.recv(10_000):
                        return client, answer
                client.close()

        def waits_for_end(client: socket.socket, sent: bytes) -> None:
            with client, contextlib.suppress(ConnectionError):  # if it is closed meanwhile
                client.sendall(sent)
                while client.recv(10_000):
                    pass  # the rest of an answer

        def trickles(client: socket.socket) -> None:
            def closed() -> bool:
                try:
                    client.sendall(b"x")
                except ConnectionError:
                    return True
                return False

            with client:
                until(closed)

        for sent in (b"", WHOLE[:20]):
            waits_for_end(socket.create_connection((host, int(port)), timeout=60), sent)
        trickles(socket.create_connection((host, int(port)), timeout=60))
        client, answer = answered(WHOLE)
        assert answer.startswith(b"HTTP/1.1 200")
        waits_for_end(client, WHOLE[:20])
        client, answer = answered(REFUSED)
        assert answer.startswith(b"HTTP/1.1 413")
        trickles(client)
        # A request that is whole has all the time that its picture takes.
        body = b'{"prompt": "x", "num_inference_steps": 50}'
        client, answer = answered(DRAW % len(body) + body)
        with client:
            assert answer.startswith(b"HTTP/1.1 200") and len(engine.seen) == 1


# -------------------------------------------------------------------------------- metrics and logs


def metrics_of(url: str) -> dict[str, float]:
    lines = [x for x in get(f"{url}/metrics").text.splitlines() if x[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics():
    engine = FakeEngine()
    with served(build_app(engine)) as url:
        _check_metrics(client_of(url), url, engine)


def _check_metrics(client: openai.OpenAI, url: str, engine: FakeEngine) -> None:
    client.images.generate(prompt="x", n=2, quality="low")
    engine.fails = Refused(500, "lost_twice", "no")
    with pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="")
    found = metrics_of(url)
    for name, value in {
        'piflux_images_total{policy="rotate",quality="low"}': 2,
        'piflux_steps_total{kind="computed"}': 3,
        'piflux_steps_total{kind="skipped"}': 1,
        "piflux_waiting_seconds_count": 1,
        'piflux_drawing_seconds_count{quality="low",ranks="2"}': 1,
        'piflux_failures_total{code="lost_twice"}': 1,
        "piflux_ready": 1,
        "piflux_queue_length": 0,
        "piflux_ranks": 2,
        'piflux_groups{size="2"}': 1,
        'piflux_rank_memory_bytes{rank="1"}': 2 << 20,
    }.items():
        assert found[name] == value, name
    for code in ("200", "400", "500"):
        route = f'code="{code}",method="POST",route="/v1/images/generations"'
        until(lambda: metrics_of(url).get(f"piflux_http_requests_total{{{route}}}") == 1)  # noqa: B023


def test_what_clients_make_up_is_no_name_of_a_metric(url):
    for method, path in (("PROPFIND", "/v1/models"), ("GET", "/made/up"), ("PROPFIND", "/made/up")):
        ask(method, url + path)
    names = "".join(metrics_of(url))
    assert "PROPFIND" not in names and "made/up" not in names
    assert 'code="405",method="other",route="/v1/models"' in names


def test_the_dashboard_asks_for_metrics_that_there_are(url, client):
    client.images.generate(prompt="x")
    there = {name.partition("{")[0] for name in metrics_of(url)}
    there |= {"piflux_failures_total"}  # of which there was none
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [x["expr"] for panel in dashboard["panels"] for x in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"\b(?:piflux|process)_\w+", query)}
    assert len(queries) > 10 and asked <= there, asked - there


def test_a_request_is_a_line(client, url, caplog):
    caplog.set_level(logging.INFO, "piflux.serving")
    draw = client.images.generate
    draw(prompt="a secret", extra_headers={"x-request-id": "abc-2"}, user="ada")
    made = draw(prompt="x", response_format="url", extra_headers={"x-request-id": "a b"})
    get(made.data[0].url)
    until(lambda: len(caplog.records) == 3)  # a line comes after its answer
    lines = [json.loads(logs.Lines().format(record)) for record in caplog.records]
    assert {line["event"] for line in lines} == {"request"}
    first, second, fetched = lines
    assert (first["id"], first["status"], first["method"]) == ("abc-2", 200, "POST")
    assert first["path"] == "/v1/images/generations" and first["seconds"] > 0
    assert (first["policy"], first["ranks"], first["steps"]) == ("gather", 2, 4)
    assert "secret" not in json.dumps(lines)
    assert re.fullmatch("[0-9a-f]{32}", second["id"])
    assert fetched["path"] == "/files/{name}"  # whose name is the key to it


# ------------------------------------------------------------------------------------------ fuzzed


def test_no_request_makes_it_fail() -> None:
    """Many more by hand: `python tests/fuzzing.py 2000`."""
    from fuzzing import fuzz  # what draws requests takes a second to import

    assert fuzz(20) > 100
