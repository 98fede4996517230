"""The report in a real browser: no error, no element out of text, and everything works by mouse and by keyboard."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if not (BROWSER and DRIVER):
    pytest.skip("chromium and its driver are not installed (apt: chromium chromium-driver)", allow_module_level=True)

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from epsdpo_kernels.record.report import report  # noqa: E402
from records import write_run  # noqa: E402
from runs import flags  # noqa: E402
from test_audit import alter  # noqa: E402
from test_report import HOSTILE  # noqa: E402

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
            options.add_argument(flag)
        options.binary_location = BROWSER
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        driver.implicitly_wait(10)
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory) -> Path:
    """The report of a real run, with texts and a category."""
    from train.__main__ import main as train

    folder = tmp_path_factory.mktemp("browser")
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["topic"] = "even" if i % 2 == 0 else "odd"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"dataset": folder / "pairs.jsonl", "label_column": "topic", "num_train_epochs": 3, "eval_fraction": 0.25}
    train(flags(tiny, folder / "run", **more))
    return report([folder / "run"], texts=True)


def look(browser, page: Path) -> None:
    size(browser, 1280)
    browser.get(page.as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#pairs tbody tr"))


def size(browser, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def cells(browser, place: int) -> list[str]:
    """A column of the table of pairs."""
    script = "return [...document.querySelectorAll('#pairs tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return browser.execute_script(script, place)


def numbers(browser, place: int) -> list[float]:
    return [float(text.replace("−", "-")) for text in cells(browser, place)]


def columns(browser) -> dict[str, int]:
    heads = browser.find_elements(By.CSS_SELECTOR, "#pairs thead button")
    return {head.get_attribute("data-column"): i for i, head in enumerate(heads)}


def test_loads_without_an_error(browser, page):
    look(browser, page)
    assert browser.get_log("browser") == []
    assert browser.title.startswith("Decision record: run")
    assert [h.text for h in browser.find_elements(By.TAG_NAME, "h2")][:2] == ["Summary", "Points to look at"]
    assert "on 36 pairs in 18 steps" in browser.find_element(By.ID, "summary").text
    assert "The record agrees with itself" in browser.find_element(By.ID, "summary").text
    drawn = browser.execute_script("return [...document.querySelectorAll('.plot svg')].map(s => s.childNodes.length)")
    assert len(drawn) == 9 and min(drawn) > 5
    dots = browser.execute_script("return [...document.querySelectorAll('path.dots')].map(p => p.getAttribute('d'))")
    assert sum(d.count("M") for d in dots) == 108
    assert len(browser.find_elements(By.CSS_SELECTOR, "#picture .boundary")) == 2  # the line, and its key
    bars = browser.execute_script("return [...document.querySelectorAll('.bar i')].map(i => i.style.width)")
    assert len(bars) == 6 and all(width.endswith("%") for width in bars)


def test_sorts_and_filters(browser, page):
    look(browser, page)
    at = columns(browser)
    assert numbers(browser, at["row"]) == sorted(numbers(browser, at["row"])) and len(cells(browser, 0)) == 36
    head = browser.find_element(By.CSS_SELECTOR, "[data-column=margin]")
    head.click()
    assert numbers(browser, at["margin"]) == sorted(numbers(browser, at["margin"]))
    head.send_keys(Keys.ENTER)  # by keyboard, the other way round
    margins = numbers(browser, at["margin"])
    assert margins == sorted(margins, reverse=True) and len(set(margins)) > 20
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"

    form = browser.find_element(By.CSS_SELECTOR, "form.filter")
    before = cells(browser, at["decision"])
    Select(form.find_element(By.NAME, "decision")).select_by_visible_text("relaxed")
    relaxed = cells(browser, at["decision"])
    assert set(relaxed) == {"▲ relaxed"} and len(relaxed) == before.count("▲ relaxed") > 0
    form.find_element(By.NAME, "margin_least").send_keys("0")
    assert 0 < len(numbers(browser, at["margin"])) <= len(relaxed) and min(numbers(browser, at["margin"])) >= 0
    form.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    WebDriverWait(browser, 5).until(lambda b: len(cells(b, 0)) == 36)
    form.find_element(By.NAME, "kl_difference_most").send_keys("0")
    found = numbers(browser, at["kl_difference"])
    assert 0 < len(found) < 36 and max(found) <= 0
    form.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    WebDriverWait(browser, 5).until(lambda b: len(cells(b, 0)) == 36)
    one = cells(browser, 0)[5]
    form.find_element(By.NAME, "search").send_keys(one[:12])
    assert cells(browser, 0) == [one]
    assert browser.find_element(By.CSS_SELECTOR, "output.count").text == "1 of 36 pairs"


def test_what_is_not_finite_passes_no_bound(browser, tmp_path):
    """Its place in the table is "–", which JavaScript would take for 0."""
    run = write_run(tmp_path, epochs=1, eval_pairs=0)
    alter(run, 3, margin=math.nan)
    alter(run, 4, row=None)
    look(browser, report([run]))
    at, form = columns(browser), browser.find_element(By.CSS_SELECTOR, "form.filter")
    assert cells(browser, at["margin"]).count("–") == 1
    for name, bound in (("least", "0"), ("most", "0"), ("least", "-1e9"), ("most", "1e9")):
        form.find_element(By.NAME, f"margin_{name}").send_keys(bound)
        found = numbers(browser, at["margin"])
        assert found and all(margin >= float(bound) if name == "least" else margin <= float(bound) for margin in found)
        assert "–" not in cells(browser, at["margin"]) and (len(found) == 39) == (bound != "0")
        form.find_element(By.CSS_SELECTOR, "[type=reset]").click()
        WebDriverWait(browser, 5).until(lambda b: len(cells(b, 0)) == 40)
    assert cells(browser, at["row"]).count("–") == 1
    form.find_element(By.NAME, "search").send_keys("null")
    assert cells(browser, 0) == ["Nothing here."]


def test_texts_not_asked_for_are_told_from_texts_not_to_be_had(browser, tmp_path):
    run = write_run(tmp_path, epochs=1, eval_pairs=0, dataset=[])  # made in memory
    for asked, said in ((False, "made without --texts"), (True, "is not carried")):
        look(browser, report([run], texts=asked))
        browser.find_element(By.CSS_SELECTOR, "#pairs tbody button").click()
        assert said in browser.find_element(By.CSS_SELECTOR, "dialog div > .note").text


def test_opens_a_pair(browser, page):
    look(browser, page)
    row = browser.find_element(By.CSS_SELECTOR, "#pairs tbody tr:nth-child(3)")
    name = row.find_element(By.TAG_NAME, "button").text
    row.find_element(By.CSS_SELECTOR, "td:last-child").click()  # by mouse, anywhere on the row
    dialog = browser.find_element(By.TAG_NAME, "dialog")
    assert dialog.find_element(By.TAG_NAME, "h2").text == name
    history = dialog.find_elements(By.CSS_SELECTOR, "tbody tr")
    assert len(history) == 3
    steps = [int(visit.find_element(By.TAG_NAME, "td").text) for visit in history]
    assert steps == sorted(steps) and 1 <= steps[0] <= 6 < steps[1] <= 12 < steps[2] <= 18
    texts = [text.text for text in dialog.find_elements(By.CSS_SELECTOR, "pre.text")]
    assert len(texts) == 3 and texts[0].endswith(" is") and texts[1].endswith("yes") and texts[2].endswith("no")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    WebDriverWait(browser, 5).until(lambda b: b.execute_script("return !document.querySelector('dialog')"))

    button = browser.find_element(By.CSS_SELECTOR, "#pairs tbody tr:nth-child(4) button")
    browser.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)  # by keyboard
    assert browser.find_element(By.CSS_SELECTOR, "dialog h2").text == button.text
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    WebDriverWait(browser, 5).until(lambda b: b.execute_script("return !document.querySelector('dialog')"))
    assert browser.switch_to.active_element == button  # the focus is back where it was

    plot = browser.find_element(By.CSS_SELECTOR, "#shares .plot")
    plot.send_keys(Keys.HOME)
    reading = browser.find_element(By.CSS_SELECTOR, "#shares output")
    first = reading.text
    plot.send_keys(Keys.ARROW_RIGHT)
    assert first.startswith("step 1: relaxed ") and reading.text.startswith("step 2: ")
    assert browser.get_log("browser") == []


def test_runs_of_different_lengths_are_read_to_the_end(browser, tmp_path):
    """Of the longer one a point is the mean of some steps; the shorter one has its own there, or none."""
    lengths = {"short": 1, "long": 40}
    runs = [write_run(tmp_path / name / "run", pairs=40, epochs=epochs) for name, epochs in lengths.items()]
    look(browser, report(runs, tmp_path / "out"))
    plot = browser.find_element(By.CSS_SELECTOR, "#curves .plot")
    reading = browser.find_element(By.CSS_SELECTOR, "#curves output")
    plot.send_keys(Keys.HOME)
    first = reading.text
    plot.send_keys(Keys.END)
    last = reading.text
    assert first.startswith("step 1: ") and "–" not in first
    short, long = last.split(": ", 1)[1].split(", ")
    assert float(last.split(":")[0].removeprefix("step ")) > 390 and short.endswith("–") and not long.endswith("–")
    assert browser.get_log("browser") == []


def test_a_narrow_screen_needs_no_sideways_scrolling(browser, page):
    look(browser, page)
    for width in (320, 390, 768):
        size(browser, width)
        WebDriverWait(browser, 5).until(lambda b, w=width: b.execute_script("return innerWidth") == w)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    size(browser, 390)
    drawn = browser.find_element(By.CSS_SELECTOR, "#picture svg[height]")
    WebDriverWait(browser, 5).until(lambda b: 300 < drawn_width(b) < 390)
    assert drawn.is_displayed()


def drawn_width(browser) -> float:
    return float(
        browser.execute_script("return document.querySelector('#picture .plot svg').getAttribute('viewBox')").split()[2]
    )


def test_hostile_text_stays_text(browser, tmp_path):
    texts = [text for text in HOSTILE if text.isprintable() or "\u202e" in text or "\x00" in text]
    rows = [{"prompt": f"p{i}", "chosen": text, "rejected": text + " no"} for i, text in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from train.data import Pair

    ids = [Pair(**row).id() for row in rows] + ["f" * 16]
    run = write_run(
        tmp_path / "<img src=x onerror=alert(3)>", pairs=len(texts), batch=2, eval_pairs=1, ids=ids, labels=texts,
        dataset=str(tmp_path / "pairs.jsonl"), model=texts[0],
    )  # fmt: skip
    alter(run, 2, decision=1)
    alter(run, 3, decision=-1)
    page = report([run], tmp_path / "out", texts=True)
    look(browser, page)
    assert browser.execute_script("return document.querySelectorAll('img, iframe, script').length") == 2
    assert "<img src=x onerror=alert(3)>" in browser.find_element(By.ID, "summary").text
    assert texts[0] in browser.find_element(By.ID, "labels").text
    shown = []
    for button in browser.find_elements(By.CSS_SELECTOR, "#pairs tbody button"):
        button.click()
        shown.append(browser.find_elements(By.CSS_SELECTOR, "dialog pre.text")[1].text)
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        WebDriverWait(browser, 5).until(lambda b: b.execute_script("return !document.querySelector('dialog')"))
    assert texts[0] in shown and texts[1] in shown and any("⟨U+202E⟩gnp.exe" in text for text in shown)
    assert browser.execute_script("return document.querySelectorAll('img, iframe, script').length") == 2
    # The policy stops what an attacker would have to run.
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s);"
    )
    assert browser.execute_script("return window.broken === undefined")
    assert all("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_a_run_of_trl_that_was_killed_twice(browser, hh_run, tmp_path):
    look(browser, report([hh_run], tmp_path, texts=True))
    assert browser.get_log("browser") == []
    summary = browser.find_element(By.ID, "summary").text
    assert "on 120 pairs in 30 steps" in summary and "The record agrees with itself: 120 rows" in summary
    assert not browser.find_elements(By.CSS_SELECTOR, "#audit li")  # nothing that could not be checked
    assert len(browser.find_element(By.CSS_SELECTOR, "#audit code").text) == 64
    browser.find_element(By.CSS_SELECTOR, "#pairs tbody button").click()
    prompt, chosen, rejected = (text.text for text in browser.find_elements(By.CSS_SELECTOR, "dialog pre.text"))
    assert prompt.startswith("Human:") and prompt.endswith("Assistant:") and chosen != rejected


def test_evaluation_sets_and_what_was_not_checked(browser, tmp_path):
    """Two sets have a mark each; a record that was left open says so, and rows without a name are no pairs."""
    run = write_run(tmp_path / "run", eval_sets=("eval_a", "eval_<b>"))
    end = json.loads((run / "record" / "end-000.json").read_text())
    (run / "record" / "end-000.json").write_text(json.dumps(end | {"closed": False}))
    look(browser, report([run], tmp_path / "out"))
    assert browser.get_log("browser") == []
    legend = browser.find_element(By.CSS_SELECTOR, "#curves .legend").text
    assert "eval_a" in legend and "eval_<b>" in legend
    script = "return [...arguments[0].querySelectorAll('path.evaluated')].map(p => p.getAttribute('d'))"
    marks = browser.execute_script(script, browser.find_element(By.CSS_SELECTOR, "#curves figure"))
    assert len(marks) == 4 and sum("a4 4" in mark for mark in marks) == sum("h8v8" in mark for mark in marks) == 2
    assert "was not closed" in browser.find_element(By.CSS_SELECTOR, "#audit li").text


def test_several_runs_in_japanese(browser, tmp_path):
    runs = [write_run(tmp_path / "one", labels=["x"]), write_run(tmp_path / "two", pairs=20, method="dpo")]
    look(browser, report(runs, tmp_path / "out", "ja"))
    assert browser.get_log("browser") == []
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "ja"
    assert len(cells(browser, 0)) == 40
    lines = browser.find_elements(By.CSS_SELECTOR, "#curves .curve")
    assert len(lines) == 2 * 6 + 2
    browser.find_element(By.CSS_SELECTOR, ".runs input[value='1']").click()
    assert len(cells(browser, 0)) == 20 and browser.get_log("browser") == []
