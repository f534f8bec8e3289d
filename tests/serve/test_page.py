"""The page as people meet it: a real browser, a real server on loopback over the tiny catalog."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Server

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect

CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CROWD = "a dog, a cat and three crowns"
CANDIDATES = ["cheap-2", "middle-3", "dear-4"]
CHOSEN = "#bars li[aria-current=true]"
_FILE = io.BytesIO()
Image.new("RGB", (2, 2)).save(_FILE, "PNG")
PNG = base64.b64encode(_FILE.getvalue()).decode()
# Chromium notes every refused call by itself; the page shows them in words.
REFUSED = re.compile(r"the server responded with a status of 40[01]\b")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("the page's tests want Debian's chromium on the PATH")
    with playwright_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=CHROMIUM)
        yield running
        running.close()


@contextmanager
def quiet_page(browser: Any, **options: Any) -> Iterator[Any]:
    """A new page, which must end without an error in its console: scripts' own, or the content policy's."""
    page = browser.new_page(**options)
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert [problem for problem in problems if not REFUSED.search(problem)] == []


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The server's page, its catalog loaded."""
    with quiet_page(browser) as opened:
        opened.goto(server.url)
        expect(opened.locator("#bars li")).to_have_count(len(CANDIDATES))
        yield opened


def draw(page: Any, prompt: str, *, number: int = 1) -> None:
    """Draws with what else is set, to the end."""
    page.fill("#prompt", prompt)
    page.select_option("#number", str(number))
    page.click("#draw")
    expect(page.locator("#stage .done")).to_have_count(number)
    expect(page.locator("#draw")).to_be_visible()


def answer_with(page: Any, events: list[dict[str, Any]]) -> None:
    """Has drawings answered with these events and nothing else."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/v1/images/generations", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def text(page: Any, selector: str) -> str:
    return page.locator(selector).inner_text()


class TestDrawing:
    def test_enter_draws_and_the_picture_says_who_drew_it_and_why(self, page: Any) -> None:
        page.fill("#prompt", CROWD)
        page.fill("#seed", "7")
        page.press("#prompt", "Enter")
        expect(page.locator("#picture-0.done")).to_be_visible()
        assert page.locator("#picture-0 .picture").evaluate("image => [image.naturalWidth, image.width]") == [64, 256]
        assert text(page, "#picture-0 .candidate") == "dear-4"
        assert text(page, "#picture-0 .why") == "Routed, at a tradeoff of 0.05."
        assert text(page, "#picture-0 .saved") == "8 GFLOP, the dearest candidate"
        assert re.fullmatch(r"Waited [\d.]+ s, drawn in [\d.]+ s", text(page, "#picture-0 .times"))
        assert text(page, "#picture-0 .seed") == "seed 7"
        assert text(page, "#status").startswith("Done in ")

    def test_a_cheap_picture_says_what_it_saves(self, page: Any) -> None:
        draw(page, "a dog")
        assert text(page, "#picture-0 .candidate") == "cheap-2"
        assert text(page, "#picture-0 .saved") == "1 of 8 GFLOP, 87% saved"

    def test_steps_are_counted_until_the_picture_is_there(self, page: Any) -> None:
        page.evaluate("""() => {
            window.seen = [];
            new MutationObserver(() => window.seen.push(document.querySelector("#picture-0 .steps").textContent))
                .observe(document.getElementById("stage"), { subtree: true, childList: true });
        }""")
        draw(page, CROWD)
        assert "step 4 of 4" in page.evaluate("window.seen")
        assert page.locator("#picture-0 .picture").evaluate("image => image.src.slice(0, 5)") == "blob:"
        expect(page.locator("#picture-0 .progress")).to_be_hidden()

    def test_a_preview_is_shown_where_the_picture_will_be(self, page: Any) -> None:
        # The tiny model may be done before its first preview is sent, so this stream is made up; it ends early.
        step = {"type": "image_generation.progress", "image_index": 0, "step": 3, "steps": 8}
        preview = {"type": "image_generation.partial_image", "image_index": 0, "b64_json": PNG, "output_format": "png"}
        answer_with(page, [step, preview])
        before = page.locator("#picture-0 .frame").bounding_box()
        page.fill("#prompt", "a dog")
        page.click("#draw")
        expect(page.locator("#picture-0 .picture")).to_have_js_property("naturalWidth", 2)
        assert page.locator("#picture-0 progress").evaluate("bar => [bar.value, bar.max]") == [3, 8]
        page.unroute("**/v1/images/generations")
        draw(page, "a dog")
        assert page.locator("#picture-0 .frame").bounding_box() == before

    def test_the_download_is_the_picture(self, page: Any, tmp_path: Path) -> None:
        page.fill("#seed", "7")
        draw(page, CROWD)
        with page.expect_download() as download:
            page.click("#picture-0 .download")
        assert download.value.suggested_filename == "catimage-dear-4-7.png"
        download.value.save_as(tmp_path / "picture.png")
        with Image.open(io.BytesIO((tmp_path / "picture.png").read_bytes())) as picture:
            assert (picture.format, picture.size) == ("PNG", (64, 64))

    def test_four_pictures_from_seeds_one_after_another(self, page: Any) -> None:
        page.fill("#seed", "7")
        draw(page, "a dog", number=4)
        assert [text(page, f"#picture-{index} .seed") for index in range(4)] == [f"seed {7 + i}" for i in range(4)]

    def test_a_candidate_chosen_by_hand(self, page: Any) -> None:
        page.select_option("#candidate", "middle-3")
        expect(page.locator("#tradeoff")).to_be_disabled()
        draw(page, "a dog")
        assert text(page, "#picture-0 .candidate") == "middle-3"
        assert text(page, "#picture-0 .why") == "Chosen by hand."

    def test_earlier_pictures_can_be_seen_and_drawn_again(self, page: Any) -> None:
        page.fill("#seed", "7")
        draw(page, CROWD)
        page.fill("#seed", "8")
        draw(page, "a dog")
        page.click("#history li:last-child button")
        assert text(page, "#viewer-prompt") == CROWD
        assert text(page, "#viewed .candidate") == "dear-4"
        page.click("#viewer-again")
        expect(page.locator("#viewer")).to_be_hidden()
        assert [page.input_value(f"#{field}") for field in ("prompt", "seed")] == [CROWD, "7"]

    def test_shift_enter_is_a_line_of_the_prompt(self, page: Any) -> None:
        page.fill("#prompt", "a dog")
        page.press("#prompt", "Shift+Enter")
        assert page.input_value("#prompt") == "a dog\n"
        expect(page.locator("#cancel")).to_be_hidden()


class TestRoutePreview:
    def test_the_slider_by_keyboard_changes_the_route(self, page: Any) -> None:
        page.fill("#prompt", CROWD)
        expect(page.locator(CHOSEN)).to_contain_text("dear-4")
        expect(page.locator("#route-preview")).to_contain_text("dear-4: 8 GFLOP, the dearest candidate")
        page.press("#tradeoff", "End")
        expect(page.locator(CHOSEN)).to_contain_text("cheap-2")
        expect(page.locator("#route-preview")).to_contain_text("cheap-2: 1 of 8 GFLOP, 87% saved")
        page.press("#tradeoff", "Home")
        expect(page.locator(CHOSEN)).to_contain_text("dear-4")
        assert text(page, "#tradeoff-value") == "0"

    def test_the_prompt_changes_the_route(self, page: Any) -> None:
        page.fill("#prompt", CROWD)
        expect(page.locator(CHOSEN)).to_contain_text("dear-4")
        page.fill("#prompt", "a dog")
        expect(page.locator(CHOSEN)).to_contain_text("cheap-2")
        page.fill("#prompt", "")
        expect(page.locator(CHOSEN)).to_have_count(0)

    def test_bars_stand_by_cost_and_are_as_long_as_the_qualities(self, page: Any) -> None:
        page.fill("#prompt", CROWD)
        expect(page.locator(CHOSEN)).to_have_count(1)
        assert page.locator("#bars .name").all_inner_texts() == CANDIDATES
        assert page.locator("#bars .cost").all_inner_texts() == ["1 GFLOP", "3 GFLOP", "8 GFLOP"]
        values = [float(value) for value in page.locator("#bars .value").all_inner_texts()]
        found = re.search(r"begin at ([\d.]+)", text(page, "#scale"))
        assert found is not None
        start = float(found[1])
        assert start < min(values)
        for row, value in zip(page.locator("#bars .fill").all(), values, strict=True):
            width = float(row.evaluate("fill => parseFloat(fill.style.width)"))
            assert width == pytest.approx(100 * (value - start) / (max(values) - start), abs=1.5)


@pytest.mark.parametrize(
    "prompt",
    ['<img src=x onerror="window.hacked=1">', "<script>window.hacked=1</script>", "\"'><svg onload=window.hacked=1>"],
    ids=["an image's handler", "a script", "out of an attribute"],
)
def test_a_prompt_is_text_wherever_it_is_shown(page: Any, prompt: str) -> None:
    draw(page, prompt)
    page.click("#history li:first-child button")
    assert text(page, "#viewer-prompt") == prompt
    assert page.locator("#viewed .picture").get_attribute("alt") == prompt
    assert page.evaluate("window.hacked") is None


@contextmanager
def halted(server: Server) -> Iterator[None]:
    """Its workers draw nothing meanwhile."""
    workers = server.worker_pids()
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


def test_cancel_frees_the_slot_and_another_can_be_drawn(page: Any, server: Server) -> None:
    cancelled = 'catimage_images_total{candidate="dear-4",outcome="cancelled"}'
    before = server.metric(cancelled)
    with halted(server):
        page.fill("#prompt", CROWD)
        page.click("#draw")
        expect(page.locator("#picture-0 .candidate")).to_have_text("dear-4")
        expect(page.locator("#cancel")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.locator("#picture-0 .steps")).to_have_text("cancelled")
        expect(page.locator("#draw")).to_be_focused()
    draw(page, CROWD)
    assert server.metric(cancelled) == before + 1
    expect(page.locator("#history li")).to_have_count(1)


class TestErrors:
    def test_the_servers_words_are_shown_until_the_next_drawing(self, page: Any) -> None:
        page.evaluate("document.getElementById('prompt').value = 'a'.repeat(4001)")
        page.click("#draw")
        expect(page.locator("#error")).to_contain_text("at most 4000 characters")
        expect(page.locator("#picture-0 .steps")).to_have_text("not drawn")
        draw(page, "a dog")
        expect(page.locator("#error")).to_be_hidden()

    @pytest.mark.parametrize(
        ("event", "shown"),
        [
            ({"type": "error", "error": {"message": "the <b>image</b> failed"}}, "the <b>image</b> failed"),
            ({"type": "image_generation.queued", "image_index": 0, "queue_depth": 1}, "connection ended"),
        ],
        ids=["an error event", "a stream cut off"],
    )
    def test_of_a_stream(self, page: Any, event: dict[str, Any], shown: str) -> None:
        answer_with(page, [event])
        page.fill("#prompt", "a dog")
        page.click("#draw")
        expect(page.locator("#error")).to_contain_text(shown)
        expect(page.locator("#draw")).to_be_visible()

    def test_a_token_is_asked_for_and_kept_in_memory_only(self, browser: Any, server: Server) -> None:
        def guard(route: Any) -> None:
            if route.request.headers.get("authorization") == "Bearer secret":
                route.continue_()
            else:
                route.fulfill(status=401, json={"error": {"message": "no"}})

        with quiet_page(browser) as page:
            page.route("**/v1/**", guard)
            page.goto(server.url)
            expect(page.locator("#token")).to_be_focused()
            page.keyboard.type("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#error")).to_have_text("The server did not accept the token.")
            page.fill("#token", "secret")
            page.press("#token", "Enter")
            expect(page.locator("#token-form")).to_be_hidden()
            expect(page.locator("#error")).to_be_hidden()
            draw(page, "a dog")
            assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
            page.reload()
            expect(page.locator("#token")).to_be_visible()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_events_are_read_however_the_stream_is_cut(page: Any, end: str) -> None:
    lines = [": a comment", "event: one", "data: first", "data:  żółw", "", "retry: 5", "", "data", "", "data: !", ""]
    whole = "".join(line + end for line in lines) + "data: not ended"
    read = page.evaluate(
        """async ([text, size]) => {
            const { readEvents } = await import("/page/sse.js");
            const bytes = new TextEncoder().encode(text);
            const stream = new ReadableStream({ start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
            } });
            return Array.fromAsync(readEvents(stream), (event) => [event.type, event.data]);
        }""",
        [whole, 1],
    )
    assert read == [["one", "first\n żółw"], ["message", ""], ["message", "!"]]


def test_the_strip_of_earlier_pictures_is_bounded_and_frees_what_it_drops(page: Any) -> None:
    left, revoked = page.evaluate("""async () => {
        const { makeHistory } = await import("/page/cards.js");
        const revoked = [];
        URL.revokeObjectURL = (url) => revoked.push(url);
        const list = document.createElement("ol");
        const add = makeHistory(list, () => {});
        for (let index = 0; index < 26; index += 1) {
            add({ url: `data:,${index}`, prompt: `picture ${index}`, route: { candidate: "cheap-2" } });
        }
        return [[...list.querySelectorAll("img")].map((image) => image.alt), revoked];
    }""")
    assert left == [f"picture {index}" for index in range(25, 1, -1)]
    assert revoked == ["data:,0", "data:,1"]


@pytest.mark.parametrize("width", [360, 700, 880, 1400])
def test_nothing_is_wider_than_the_window(browser: Any, server: Server, width: int) -> None:
    with quiet_page(browser, viewport={"width": width, "height": 800}) as page:
        page.goto(server.url)
        draw(page, "dog" * 100, number=2)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter((one) => !(one.labels?.length || one.textContent.trim())).map((one) => one.id)""")
    assert nameless == []
