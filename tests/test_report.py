"""The report, also as a browser shows it; those tests skip where Chromium is not installed."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from captioner.metrics.files import ReferenceSet
from captioner.metrics.systems import evaluate_systems
from captioner.report import page, write_report
from captioner.report.plots import Range, histogram, intervals
from captioner.report.thumbnails import thumbnail

FAST = ("BLEU", "ROUGE-L", "CIDEr")
EVIL = (
    "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\"><!-- {{7*7}} &amp;"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")


def evaluate(systems=1, images=90, evil=False):
    """Captions that get better image by image; the second system the other way about."""
    words = ["a", "brown", "dog", "runs", "through", "tall", "green", "grass", "today"]
    references = {n: [" ".join(words[: 4 + n % 6] + [f"w{n}"])] * 5 for n in range(images)}
    results = {}
    for system in range(systems):
        keep = [(n if system == 0 else images - n) * len(words) // images + 1 for n in range(images)]
        rows = [{"image_id": n, "caption": " ".join([*words[: keep[n]], f"w{n}"])} for n in range(images)]
        results[f"system{system}.json"] = rows
    if evil:
        results = {EVIL + name: rows for name, rows in results.items()}
        for rows in results.values():
            rows[3]["caption"] = EVIL
        references[3] = [EVIL, "\u2028 a dog", "]]>", "<b>bold</b>", "a"]
        references = {EVIL if n == 5 else n: group for n, group in references.items()}
        for rows in results.values():
            rows[5]["image_id"] = EVIL
    found = ReferenceSet(references, dict.fromkeys(references, "x.jpg"), "test", [EVIL] if evil else [])
    return evaluate_systems(results, found, metrics=FAST, samples=20)


def write(evaluation, path, images=None):
    with path.open("w", encoding="utf-8") as file:
        unreadable = write_report(file, evaluation, EVIL, images or {})
    return unreadable, path.read_text("utf-8")


class Tags(HTMLParser):
    """Collects the tags of a page, and the JSON blocks as a browser would delimit them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.blocks, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.inside:
            self.blocks[self.inside] = self.blocks.get(self.inside, "") + data


@pytest.mark.parametrize("systems", [1, 2])
def test_nothing_a_user_wrote_becomes_markup(tmp_path, systems):
    _, text = write(evaluate(systems, evil=True), tmp_path / "page.html")
    parsed = Tags(text)
    kinds = {tag for tag, _ in parsed.tags}
    assert not kinds & {"img", "iframe", "link", "object", "base"}
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert [a.get("id") for a in scripts] == ["images-0", "data", None]
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    data = json.loads(parsed.blocks["data"])
    assert data["systems"][0]["captions"][3] == EVIL
    assert EVIL in data["ids"]
    assert "<!--" not in text
    assert text.count("<script>") == 1


def test_the_page_needs_nothing_else(tmp_path):
    _, text = write(evaluate(2), tmp_path / "page.html")
    assert not re.search(r"(https?:)?//[a-z]", text.replace("//# ", ""))
    for tag, attributes in Tags(text).tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_images_are_small_and_a_bad_one_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "BLOCK", 2)
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes(b"broken")
    images = {0: tmp_path / "a.jpg", 2: tmp_path / "b.jpg", 4: tmp_path / "gone.jpg"}
    unreadable, text = write(evaluate(images=5), tmp_path / "page.html", images)
    assert unreadable == 2
    blocks = [json.loads(Tags(text).blocks[f"images-{n}"]) for n in range(3)]
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert [bool(one) for block in blocks for one in block] == [True, False, False, False, False]
    data = base64.b64decode(blocks[0][0])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("WEBP", (160, 107))
        assert image.getpixel((5, 5))[0] > 200
    assert b"secret" not in data


def test_a_thumbnail_leaves_the_image_as_it_is_and_enlarges_none():
    image = Image.new("RGB", (30, 90), "red")
    for side, size in ((60, (20, 60)), (500, (30, 90))):
        with Image.open(io.BytesIO(base64.b64decode(thumbnail(image, side, 80)))) as small:
            assert small.size == size
    assert image.size == (30, 90)


def test_scores_and_verdict_stand_in_the_page(tmp_path):
    evaluation = evaluate(2)
    _, text = write(evaluation, tmp_path / "page.html")
    for name, gain in evaluation.differences.items():
        assert f'<th scope="row">{name}</th>' in text
        assert f"{gain.first:.4f}" in text
        assert f"p {gain.p:.3f}" in text
    assert text.count("<figure>") == 9  # intervals of scores and gains; BLEU-4, ROUGE-L, CIDEr, gains of each, words
    assert text.count("no clear difference") == sum(gain.p >= 0.05 for gain in evaluation.differences.values())


def shares(svg, named=r"[^<]*"):
    """Name and height in percent of each bar, as its tooltip has them."""
    return {name: float(share) for name, share in re.findall(rf"<title>({named}): ([\d.]+)%</title>", svg)}


def test_a_histogram_counts_every_value_once():
    values = np.array([0.0, 0.1, 0.1, 0.9, np.nan])
    svg = histogram([("<a>", values)], "x & y")
    assert sorted(shares(svg).values()) == [25, 25, 50]
    assert "x &amp; y. &lt;a&gt;: median 0.1" in svg
    assert shares(histogram([("a", np.array([3, 3, 4, 9]))], "words", whole=True)) == {"3": 50, "4": 25, "9": 25}
    signed = histogram([("a", np.array([-0.5, 0.0, 0.5, 0.5]))], "gain", signed=True)
    assert [signed.count(f'"bar {side}"') for side in ("less", "even", "more")] == [1, 1, 1]
    assert histogram([("a", np.array([np.nan]))], "none") == ""
    endless = histogram([("a", np.array([3, 200_000] * 9))], "words", whole=True)
    assert shares(endless) == {"3": 50, "63": 50}


def test_a_histogram_of_one_value_has_labels():
    for constant in (0.0, 1.0, -2.0):
        for options in ({}, {"whole": True}, {"signed": True}):
            svg = histogram([("a", np.full(3, constant))], "one value", **options)
            assert list(shares(svg).values()) == [100]
            assert svg.count("<text") > 2
            assert "nan" not in svg


def bars(svg, kind):
    """Left and right end of each path of a class, in px."""
    paths = re.findall(rf'<g class="{kind}"><title>[^<]*</title><path [^>]*d="M ([\d.]+) [\d.]+ L ([\d.]+) ', svg)
    return [(float(low), float(high)) for low, high in paths]


def test_intervals_lie_on_one_axis():
    rows = [("B", [Range(0.5, 0.25, 0.75), None]), ("C", [Range(0.25, 0.0, 0.5), Range(0.625, 0.5, 0.75)])]
    svg = intervals(rows, "scores & more")
    (low, high), (zero, middle) = bars(svg, "range of-0")
    ((also_middle, also_high),) = bars(svg, "range of-1")
    assert also_middle == pytest.approx(middle, abs=0.02)
    assert also_high == pytest.approx(high, abs=0.02)
    assert middle - zero == pytest.approx(high - low, abs=0.02)
    assert zero < low < middle < high
    assert svg.count("<title>0.6250, 0.5000 to 0.7500</title>") == 2  # of the interval and of the dot
    assert "scores &amp; more" in svg
    assert intervals([("B", [None])], "nothing") == ""


def test_differences_have_zero_in_the_middle():
    svg = intervals([("B", [Range(0.1, 0.05, 0.2)]), ("C", [Range(0.0, 0.0, 0.0)])], "gains", signed=True)
    (zero,) = re.findall(r'<g class="zero"><path [^>]*d="M ([\d.]+) ', svg)
    (low, _), (point, same) = bars(svg, "range of-gain")
    assert point == same == float(zero)
    assert low > float(zero)


@pytest.mark.parametrize("systems", [1, 2])
def test_plots_are_equal_on_each_run_and_need_no_ids_or_inline_styles(tmp_path, systems):
    _, text = write(evaluate(systems, evil=True), tmp_path / "page.html")
    _, again = write(evaluate(systems, evil=True), tmp_path / "again.html")
    assert text == again
    inside, ids = [], []
    for tag, attributes in Tags(text).tags:
        ids += [attributes["id"]] if "id" in attributes else []
        assert "style" not in attributes, tag  # the page's content security policy would block it
        inside += [attributes] if tag == "svg" else []
    assert len(ids) == len(set(ids))
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in inside)
    assert not re.search(r"url\(|xlink|<use|<metadata|<defs", text.partition('id="list"')[0])


def test_a_report_leaves_matplotlib_as_it_was(tmp_path):
    code = """if True:
        import sys
        import numpy as np
        from captioner.report.plots import histogram
        import captioner.report.curves, captioner.report.page, captioner.report.tradeoff
        assert "matplotlib" not in sys.modules, "loaded before anything is drawn"
        import matplotlib
        settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}  # finds a screen
        before = settings()
        histogram([("$x$ \u56f3", np.ones(3)), ("b", np.ones(3))], "x")
        assert settings() == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.fixture
def browse(tmp_path):
    opened = []

    def browse(evaluation, images=None, fragment=""):
        write(evaluation, tmp_path / "page.html", images)
        opened.append(Browser((tmp_path / "page.html").as_uri() + fragment, tmp_path / f"profile{len(opened)}"))
        return opened[-1]

    yield browse
    for browser in opened:
        browser.close()


@needs_chromium
@pytest.mark.slow
def test_sorting_searching_and_paging_in_a_browser(browse, tmp_path):
    evaluation = evaluate()
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "a.png")
    browser = browse(evaluation, dict.fromkeys(range(80), tmp_path / "a.png"))
    cider = evaluation.systems[0].scores.per_image["CIDEr"].round(4)
    worst = [str(n) for n in np.argsort(cider, kind="stable")]
    assert browser.ids() == worst[:40]  # the list starts with the worst and grows on demand
    assert browser.js("document.querySelectorAll('#rows img').length") == sum(int(n) < 80 for n in worst[:40])
    assert browser.js("[...document.querySelectorAll('#rows img')].some(image => image.naturalWidth)") is False  # lazy
    browser.js("document.querySelector('#rows img').scrollIntoView()")
    browser.wait("document.querySelector('#rows img').naturalWidth === 40")
    browser.js("document.querySelector('#more').click()")
    assert browser.ids() == worst[:80]
    browser.js("[...document.querySelectorAll('#heads button')].find(b => b.textContent === 'ROUGE-L').click()")
    rouge = evaluation.systems[0].scores.per_image["ROUGE-L"].round(4)
    assert browser.ids() == [str(n) for n in np.argsort(-rouge, kind="stable")[:40]]
    assert browser.js("document.querySelector('[data-metric=ROUGE-L]').getAttribute('aria-sort')") == "descending"
    browser.js("[...document.querySelectorAll('#presets button')].find(b => b.textContent === 'Worst').click()")
    assert browser.js("document.querySelector('#order').value") == "asc"
    browser.js("query.value = 'W17'; query.dispatchEvent(new Event('input'))")
    browser.wait("document.querySelectorAll('#rows tr').length === 1")
    assert browser.ids() == ["17"]
    browser.js("document.querySelector('#rows summary').click()")
    browser.wait("document.querySelectorAll('#rows details li').length === 5")
    assert browser.js("document.querySelector('#rows q').textContent") == evaluation.systems[0].captions[17]
    assert browser.js("document.querySelector('#status').textContent").startswith("1 of 90 images, sorted by ROUGE-L")
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data", "about"}


@needs_chromium
@pytest.mark.slow
def test_two_systems_and_hostile_captions_in_a_browser(browse):
    evaluation = evaluate(2, evil=True)
    browser = browse(evaluation, fragment="#metric=CIDEr&of=gain&order=desc&query=%3Cscript%3E&__proto__=1")
    assert sorted(browser.ids()) == ["3", EVIL]
    assert browser.js("document.querySelectorAll('#rows img, #rows script').length") == 0
    assert browser.js("document.title").startswith("Caption scores: </script><script>")
    browser.js("document.querySelectorAll('#rows summary').forEach(s => s.click())")
    browser.wait("document.querySelectorAll('#rows q').length === 4")
    assert browser.js("document.querySelectorAll('#rows img, #rows script, #rows b b').length") == 0
    browser.js("query.value = ''; query.dispatchEvent(new Event('input'))")
    browser.wait("document.querySelectorAll('#rows tr').length === 40")
    first, second = (system.scores.per_image["CIDEr"].round(4) for system in evaluation.systems)
    ids = [str(n) for n in evaluation.image_ids]
    assert browser.ids() == [ids[n] for n in np.argsort(-(second - first).round(9), kind="stable")[:40]]
    browser.js(
        "[...document.querySelectorAll('#presets button')].find(b => b.textContent === 'Most different').click()"
    )
    assert browser.ids() == [ids[n] for n in np.argsort(-np.abs(second - first).round(9), kind="stable")[:40]]
