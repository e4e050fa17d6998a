"""The page, in a real browser."""

import shutil
import time

import pytest

from tests.conftest import picture
from tests.ranks import run_on_ranks
from tests.serve.server import chat, serving, shown, words

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KEY = "sk-page"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


def slower_without_pictures(engine):
    """So that there is time to stop an answer."""
    time.sleep(0.02 if all(row.asked.pixels for row in engine._rows) else 0.5)


@pytest.fixture(scope="module")
def served(coloured_squares, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("page"), coloured_squares / "tokenizer.model"
    limits = {"answer_tokens": 60, "pictures": 2}
    with serving(
        tokenizer, folder, key=KEY, before_step=slower_without_pictures, **limits
    ) as running:
        yield running


def ask(page, question):
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")


def last_answer(page):
    page.locator("#chat[aria-busy=false]").wait_for()
    return page.locator("li.assistant p").last.inner_text()


def visit(url, red, note):
    """What a user sees and does; returns what is to be compared."""
    from playwright.sync_api import sync_playwright

    seen = {"complaints": [], "addresses": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: seen["complaints"].append(str(error)))
        page.on("console", lambda message: seen["complaints"].append(message.text))
        page.on("request", lambda request: seen["addresses"].append(request.url))
        page.goto(url)
        grounds = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        seen["grounds"] = grounds

        ask(page, "Caption:")
        page.locator("#alarm:not(:empty)").wait_for()
        seen["without key"] = page.get_by_role("alert").inner_text()
        seen["kept question"] = page.get_by_label("Question").input_value()
        seen["entries"] = page.locator("li").count()
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").blur()
        page.locator("#model", has_text="tiny").wait_for()
        seen["alarm"] = page.get_by_role("alert").inner_text()

        page.get_by_label("Pictures").set_input_files([note])
        seen["no picture"] = page.get_by_role("alert").inner_text()
        page.get_by_label("Pictures").set_input_files([red, red])
        page.get_by_role("button", name="Remove red.png").first.click()
        ask(page, "Caption:")
        page.locator("li.running p:not(:empty)").wait_for()
        seen["stops"] = page.get_by_role("button", name="Stop").is_visible()
        seen["first"] = last_answer(page)
        seen["shown"] = page.locator("li.user img").count()
        ask(page, "<b>And?</b>")
        seen["second"] = last_answer(page)
        seen["bold"] = page.locator("li b").count()

        page.get_by_role("button", name="New chat").click()
        ask(page, "Say it.")
        page.locator("li.running p:not(:empty)").wait_for()
        page.get_by_role("button", name="Stop").press("Enter")
        seen["stopped"] = last_answer(page), page.locator("li .note").last.inner_text()

        page.get_by_role("button", name="New chat").click()
        seen["anew"] = page.locator("li").count()
        page.evaluate(DROP)
        page.get_by_role("button", name="Remove dropped.png").nth(2).wait_for()
        page.get_by_role("button", name="Send").click()
        page.locator("#alarm:not(:empty)").wait_for()
        seen["too many"] = page.get_by_role("alert").inner_text()
        seen["kept pictures"] = page.locator("#chosen img").count()
        seen["unnamed"] = page.evaluate(UNNAMED)
        browser.close()
    return seen


DROP = """() => {
  const data = new DataTransfer();
  for (let n = 0; n < 3; n++) data.items.add(new File(["x"], "dropped.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
}"""
UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, img")].filter(
  (one) => !(one.ariaLabel || one.labels?.[0]?.textContent || one.alt || one.textContent.trim())
).length"""


@pytest.mark.slow
def test_the_page(served, tmp_path):
    red, note = tmp_path / "red.png", tmp_path / "note.txt"
    red.write_bytes(picture("red"))
    note.write_text("no picture")
    [seen] = run_on_ranks(1, lambda _: visit(served.url, red, note), groups=False)

    def answer(*contents):
        answered = served.post(chat(*contents), authorization=f"Bearer {KEY}").json()
        return answered["choices"][0]["message"]["content"].strip()

    assert "API key is missing" in seen["without key"]
    assert (seen["kept question"], seen["entries"], seen["alarm"]) == ("Caption:", 0, "")
    assert seen["no picture"] == "note.txt is no PNG, JPEG or WebP picture"
    first = [shown(red.read_bytes()), words("Caption:")]
    whole = served.post(chat(first), authorization=f"Bearer {KEY}").json()
    text = whole["choices"][0]["message"]["content"]
    assert seen["first"].strip() == text.strip()
    assert seen["second"].strip() == answer(first, text, "<b>And?</b>")
    assert (seen["shown"], seen["bold"], seen["stops"]) == (1, 0, True)
    stopped, why = seen["stopped"]
    assert why == "stopped"
    assert len(stopped) < len(seen["first"])
    served.wait_until("running_requests", 0)
    assert seen["anew"] == 0
    assert "3 pictures exceed the limit of 2" in seen["too many"]
    assert seen["kept pictures"] == 3
    assert seen["unnamed"] == 0
    light, dark = seen["grounds"]
    assert light != dark
    assert all(address.startswith((served.url, "blob:")) for address in seen["addresses"])
    # The browser tells of the answers 401 and 400, and of the three pictures that are none.
    odd = [text for text in seen["complaints"] if "Failed to load resource" not in text]
    assert not odd
