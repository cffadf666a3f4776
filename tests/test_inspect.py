"""Tokens in a table, in a file and on a page; the page as a browser shows it."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import tip_kernels as tip
from tip_kernels import __main__ as command

pytest.importorskip("transformers")

from tip_kernels.inspect import TokenTable, page, save_statistics
from tip_kernels.inspect.tokens import Top, names, pieces, table_of
from tip_kernels.inspect.usage import UsageError
from tip_kernels.opd import addition
from tip_kernels.opd.inspect_cli import _observe
from tip_kernels.opd.pair import load_pair
from tip_kernels.opd.settings import PACKAGED, Settings
from tip_kernels.opd.task import load_task
from tip_kernels.opd.train import Loop, response_head

CPU = torch.device("cpu")
NASTY = [
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "\"quoted\" 'and' &amp;",
    "\u0000\u001b[31m",
    "שלום",
    "\u202eevil\u2066",
    "👩‍🚀",
    " \n\t",
    "http://example.test/x",
    "HTTPS://EXAMPLE.test",
    "\\u0068ttp \\",
    "",
    "\ud800",
    "{{ 7*7 }}",
]


def write_table(n=14, rollouts=2):
    """A table of n tokens with every column, made up; the texts are NASTY ones in turn."""
    torch.manual_seed(0)
    text = [NASTY[i % len(NASTY)] for i in range(n)]
    stats = {name: torch.rand(n) * 2 for name in ("entropy_s", "entropy_t", "kl_rev", "kl_fwd", "score")}
    stats["kl_rev"][:3] = torch.tensor([math.inf, math.nan, 0.0])
    p = torch.rand(n, 5).sort(1, descending=True).values / 5
    top = Top(torch.randint(0, len(NASTY), (n, 5)), p)
    return TokenTable(
        rollout=torch.arange(n) * rollouts // n,
        text=text,
        statistics=stats,
        kept=torch.arange(n) % 3 == 0,
        top_s=top,
        top_t=Top(top.places.flip(0), p.flip(1)),
        strings=list(NASTY),
        rollouts=[{"prompt": NASTY[i % len(NASTY)], "group": "a<b", "right": i % 2 == 0} for i in range(rollouts)],
        about={"task": "<b>http</b>"},
    )


def equal(a, b, p=0.0):
    assert torch.equal(a.rollout, b.rollout) and a.text == b.text and a.rollouts == b.rollouts and a.about == b.about
    assert a.statistics.keys() == b.statistics.keys() and torch.equal(a.kept, b.kept)
    for name in a.statistics:
        torch.testing.assert_close(a.statistics[name], b.statistics[name], rtol=0, atol=p, equal_nan=True)
    for one, other in ((a.top_s, b.top_s), (a.top_t, b.top_t)):
        torch.testing.assert_close(one.p, other.p, rtol=0, atol=p, equal_nan=True)
        listed = [[[t.strings[i] for i in row] for row in top.places] for t, top in ((a, one), (b, other))]
        assert listed[0] == listed[1]


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_a_table_survives_safetensors_and_is_refused_when_it_is_another_file(tmp_path):
    table = write_table()
    table.save(tmp_path / "t.safetensors")
    equal(table, TokenTable.load(tmp_path / "t.safetensors"))
    with pytest.raises(UsageError, match=r"expected statistics that save_statistics wrote"):
        TokenTable.load(PACKAGED / "student" / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"expected safetensors in .*broken"):
        TokenTable.load(tmp_path / "broken.safetensors")


def test_a_table_survives_parquet_and_a_plain_one_of_pandas_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = write_table()
    table.text = [text.replace("\ud800", "?") for text in table.text]  # no UTF-8
    table.strings = [text.replace("\ud800", "?") for text in table.strings]
    table.save(tmp_path / "t.parquet")
    equal(table, TokenTable.load(tmp_path / "t.parquet"))
    plain = arrow.table(
        {"rollout": [7, 7, 3], "text": ["a", None, "c"], "entropy_s": [0.1, None, 0.3], "note": ["x"] * 3}
    )
    parquet.write_table(plain, tmp_path / "plain.parquet")
    found = TokenTable.load(tmp_path / "plain.parquet")
    assert (
        found.rollout.tolist() == [0, 0, 1] and found.text == ["a", "", "c"] and list(found.statistics) == ["entropy_s"]
    )
    assert math.isnan(found.statistics["entropy_s"][1]) and found.kept is None and found.top_s is None
    assert found.quadrants().tolist() == [0, 0, 0]
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "less.parquet")
    with pytest.raises(UsageError, match=r"expected a column 'rollout'"):
        TokenTable.load(tmp_path / "less.parquet")


BROKEN = {
    "a short column": lambda t: t.statistics.update(kl_rev=torch.zeros(3)),
    "no statistic": lambda t: t.statistics.clear(),
    "descending rollouts": lambda t: setattr(t, "rollout", t.rollout.flip(0)),
    "a rollout too many": lambda t: t.rollouts.pop(),
    "a string too few": lambda t: t.strings.pop() and t.top_s.places.fill_(len(NASTY) - 1),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_whose_columns_disagree_is_one_clear_error(tmp_path, breaking):
    table = write_table()
    breaking(table)
    table.save(tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match=r"argument FILE: .*t.safetensors: expected "):
        TokenTable.load(tmp_path / "t.safetensors")


def test_joined_tables_keep_their_rows_and_lack_what_they_lacked():
    one, other = write_table(), write_table(6, rollouts=3)
    other.kept = other.top_t = None
    other.strings = list(reversed(other.strings))
    del other.statistics["score"]
    both = TokenTable.join([one, other])
    n = len(one.text)
    assert both.rollout.tolist() == one.rollout.tolist() + [i + 2 for i in other.rollout.tolist()]
    assert both.statistics["score"][n:].isnan().all() and torch.equal(
        both.statistics["kl_fwd"][n:], other.statistics["kl_fwd"]
    )
    assert not both.kept[n:].any() and torch.equal(both.kept[:n], one.kept)
    texts = [[both.strings[i] for i in row] for row in both.top_s.places[n:]]
    assert texts == [[other.strings[i] for i in row] for row in other.top_s.places]
    assert (both.top_t.places[n:] == -1).all() and both.top_t.p[n:].isnan().all()


class Bytes:
    """A tokenizer of bytes, in which one character may take several tokens."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")

    def convert_ids_to_tokens(self, ids):
        return [f"<0x{i:02X}>" for i in ids]


def test_pieces_of_a_text_add_up_to_it_and_wait_for_whole_characters():
    text = "naïve 👩‍🚀\n שלום"
    found = pieces(Bytes(), list(text.encode()))
    assert "".join(found) == text and len(found) == len(text.encode()) and "�" not in "".join(found)
    assert found[:4] == ["n", "a", "", "ï"]
    assert "".join(pieces(Bytes(), list("é".encode())[:1])) == "�"
    assert names(Bytes(), [97, 0xC3, 32]) == ["a", "<0xC3>", " "]


def test_a_table_of_a_batch_has_its_statistics_and_likeliest_tokens():
    torch.manual_seed(1)
    logits_s, logits_t = torch.randn(2, 4, 40) * 3, torch.randn(2, 4, 40) * 3
    tokens, mask = torch.randint(0, 40, (2, 4)) + 40, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    stats = tip.token_stats(logits_s, logits_t, labels=tokens - 40)
    kept = tip.SoftOr(0.5)(stats, mask)
    facts = [{"prompt": "x"}, {"prompt": "y"}]
    table = table_of(
        stats, tokens, Bytes(), row_mask=mask, kept=kept, student=logits_s, teacher=logits_t, top_k=3, rollouts=facts
    )
    rows = mask.flatten()
    assert table.rollout.tolist() == [0, 0, 0, 1, 1] and table.text == [chr(i) for i in tokens[mask].tolist()]
    assert list(table.statistics) == [
        "entropy_s",
        "entropy_t",
        "kl_rev",
        "kl_fwd",
        "hellinger_sq",
        "score",
        "logp_s",
        "logp_t",
    ]
    assert torch.equal(table.statistics["kl_rev"], stats.kl_rev[rows]) and torch.equal(table.kept, kept.mask[rows])
    for top, logits in ((table.top_s, logits_s), (table.top_t, logits_t)):
        p, ids = logits.flatten(0, 1)[rows].softmax(-1).topk(3)
        torch.testing.assert_close(top.p, p)
        assert [[table.strings[i] for i in row] for row in top.places] == [names(Bytes(), row) for row in ids.tolist()]
    listed = tip.TopK(torch.tensor([[[3, 5, -1]] * 4] * 2), torch.tensor([[[-3.0, -0.1, 0.0]] * 4] * 2))
    stats = tip.token_stats(logits_s, listed)
    table = table_of(stats, tokens, Bytes(), teacher=listed)
    assert table.top_s is None and table.top_t.places[:, 2].eq(-1).all()
    torch.testing.assert_close(table.top_t.p[0, :2], torch.tensor([-0.1, -3.0]).exp())
    assert table.strings[table.top_t.places[0, 0]] == chr(5)


def test_save_statistics_names_a_bad_argument(tmp_path):
    stats = tip.token_stats(torch.randn(2, 3, 7))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    path = tmp_path / "s.safetensors"
    save_statistics(path, stats, tokens, Bytes())
    assert list(TokenTable.load(path).statistics) == ["entropy_s"]
    for message, arguments, options in [
        (r"^stats: ", ({}, tokens, Bytes()), {}),
        (r"^stats: expected entropy_s of 4 rows", (stats, tokens[:, :2], Bytes()), {}),
        (r"^tokens: ", (stats, tokens.flatten(), Bytes()), {}),
        (r"^row_mask: ", (stats, tokens, Bytes()), {"row_mask": tokens}),
        (r"^top_k: ", (stats, tokens, Bytes()), {"top_k": 0}),
        (r"^rollouts: ", (stats, tokens, Bytes()), {"rollouts": [{}]}),
    ]:
        with pytest.raises(ValueError, match=message):
            save_statistics(path, *arguments, **options)


def test_observed_rollouts_are_measured_and_kept_as_in_the_run():
    settings = Settings(batch=4, rule="divergence", keep=0.3)
    table = _observe(settings, {"prompts": 6}, None, "before", lambda line: None)
    pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", CPU)
    loop = Loop(settings, pair, load_task("addition", None), CPU)
    rollouts = loop.complete(loop.held_out[:4], loop.seed("inspect 0"))
    stats = tip.token_stats(*(response_head(side, rollouts) for side in (pair.student, pair.teacher)))
    rows, n = rollouts.mask.flatten(), int(rollouts.mask.sum())
    torch.testing.assert_close(table.statistics["kl_rev"][:n], stats.kl_rev[rows])
    torch.testing.assert_close(table.statistics["entropy_t"][:n], stats.entropy_t[rows])
    assert torch.equal(table.kept[:n], tip.TopDivergence(0.3)(stats, rollouts.mask).mask[rows])
    assert torch.equal(table.quadrants()[:n], tip.quadrants(stats)[rows])
    assert len(table.rollouts) == 6 and table.about["rule"] == "divergence, keep 0.3"
    for i, rollout in enumerate(table.rollouts):
        text = "".join(table.text[j] for j in (table.rollout == i).nonzero().flatten())
        assert rollout["right"] == (rollout["ended"] and addition.is_right(rollout["prompt"], text))
    drawn = [table.top_s.p[i][[table.strings[k] for k in table.top_s.places[i]].index(table.text[i])] for i in range(5)]
    torch.testing.assert_close(torch.stack(drawn).log(), table.statistics["logp_s"][:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"preset": "adakd"}, {"teacher_topk": 4}, {"rule": "random"}])
def test_every_way_to_choose_tokens_can_be_looked_at(settings):
    table = _observe(Settings(**settings), {"prompts": 3}, None, None, lambda line: None)
    assert table.kept.any() and "group" not in table.rollouts[0]
    assert page.inspect_page(table, "x")


def test_no_page_holds_an_address_or_unescaped_text():
    html = page.inspect_page(write_table(), "<i>http://title</i>")
    assert "http" not in html.lower() and "onerror" in html and "<img" not in html and "<i>" not in html
    assert "src=" not in re.sub(r"<script.*?</script>", "", html, flags=re.S) and "//# source" not in html
    assert re.findall(r"<link[^>]*>", html) == ['<link rel="icon" href="data:,">'] and "@import" not in html
    assert html.count("</script>") == 4 and html.isascii() is False
    data = data_of(html)
    assert [data["strings"][i] for i in data["text"]] == NASTY
    assert data["rollouts"][0]["prompt"] == NASTY[0] and data["about"] == [["task", "<b>http</b>"]]
    kl = next(s for s in data["statistics"] if s["name"] == "kl_rev")["values"]
    assert kl[:3] == ["Infinity", None, 0.0]
    assert data["quadrant"] == "".join(map(str, write_table().quadrants().tolist())) and data["kept"][:4] == "1001"


def test_chart_js_is_as_published():
    import hashlib

    text = (Path(page.__file__).parent / "static" / "chart.umd.min.js").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
    assert "MIT" in (Path(page.__file__).parent / "static" / "chart.LICENSE.md").read_text()
    assert re.findall(rb"http[^\s]*", text) == [b"https://www.chartjs.org", b"https://github.com/kurkle/color#readme"]


# In a browser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run, its student inspected before and after: 200 rollouts, and their statistics in a file."""
    folder = tmp_path_factory.mktemp("run") / "short"
    arguments = ["--steps", 5, "--batch", 24, "--eval-prompts", 100, "--quiet", "--output", folder]
    assert command.main(["opd", *map(str, arguments)]) == 0
    assert command.main(["inspect", str(folder), "--save", str(folder / "tokens.safetensors"), "--quiet"]) == 0
    return folder


def test_a_run_is_inspected_before_and_after_and_a_file_of_it_makes_the_same_page(run, capsys):
    data = data_of((run / "inspect.html").read_text())
    assert len(data["rollouts"]) == 200
    assert [r["group"] for r in data["rollouts"]] == ["before training"] * 100 + ["after training"] * 100
    again = run / "again.html"
    assert command.main(["inspect", str(run / "tokens.safetensors"), "--output", str(again), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    other = data_of(again.read_text())
    own = ("title", "strings", "text", "top_s", "top_t", "beside")
    assert {k: v for k, v in other.items() if k not in own} == {k: v for k, v in data.items() if k not in own}
    assert result["rollouts"] == 200 and result["q3"] == data["quadrant"].count("3") > 0
    assert result["kept"] == data["kept"].count("1")


def test_checkpoints_with_prompts_of_a_file_are_inspected(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{i}+{i}=\n" for i in range(100, 120)))
    output = tmp_path / "page.html"
    arguments = ["--teacher", PACKAGED / "teacher", "--student", PACKAGED / "student", "--task", prompts]
    arguments += ["--rule", "entropy", "--keep", "5", "--entropy", "0.5", "--output", output]
    assert command.main(["inspect", *map(str, arguments)]) == 0
    data = data_of(output.read_text())
    assert len(data["rollouts"]) == 4 and data["cuts"] == {"entropy": 0.5, "divergence": 0.1}
    assert data["kept"].count("1") == 20 and "right" not in data["rollouts"][0]
    assert data["title"] == "student beside teacher: which tokens matter" and str(tmp_path) not in output.read_text()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("browser tests need Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser):
    """Opens a file; at the end nothing may have been said on the console or asked of anything but that file."""
    contexts, said, asked, opened = [], [], [], []

    def show(path, scheme="light", width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda request: asked.append(request.url))
        opened.append(Path(path).as_uri())
        tab.goto(opened[-1])
        return tab

    yield show
    for context in contexts:
        context.close()
    assert said == [] and asked == opened


def background(node):
    return node.evaluate("node => getComputedStyle(node).backgroundColor")


def until(tab, holds):
    """Waits for input to have been handled: a browser may answer a question before it."""
    for _ in range(60):
        if holds():
            return True
        tab.wait_for_timeout(50)
    return False


def hover(tab, i):
    tab.hover(f'.t[data-i="{i}"]')
    tab.locator(f'#detail[data-i="{i}"]').wait_for()


def ring(tab):
    """Where the ring is, in the window."""
    box = tab.locator("#ring").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_colours_switch_between_quadrants_and_statistics(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    place = data["quadrant"].index("3")
    wrong, solved = (tab.locator(f'.t[data-i="{i}"]') for i in (place, data["quadrant"].index("4")))
    assert "q3" in wrong.get_attribute("class") and background(wrong) != background(solved)
    before = background(wrong)
    for statistic in data["statistics"]:
        tab.select_option("#colour", statistic["name"])
        assert tab.locator("#legend .scale").count() == 1
    tab.select_option("#colour", "kl_rev")
    values = next(s for s in data["statistics"] if s["name"] == "kl_rev")["values"]
    luminance = "node => getComputedStyle(node).backgroundColor.match(/[0-9]+/g).reduce((a, b) => a + +b, 0)"
    assert background(wrong) != before and wrong.evaluate(luminance) < solved.evaluate(luminance) - 200
    assert values[place] > 1
    tab.select_option("#colour", "quadrant")
    assert background(wrong) == before
    kept = tab.locator(f'.t[data-i="{data["kept"].index("1")}"]')
    assert kept.evaluate("node => getComputedStyle(node).textDecorationLine") == "underline"
    assert solved.evaluate("node => getComputedStyle(node).fontWeight") == "400"


def test_hovering_a_token_shows_both_models_and_its_statistics(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    i = data["quadrant"].index("3")
    hover(tab, i)
    detail = tab.locator("#detail")
    text = detail.inner_text()
    assert "Q3 overconfident and wrong" in text and f"token {i + 1} of" in text
    for statistic in data["statistics"]:
        row = detail.locator(".numbers div", has_text=statistic["label"]).first
        shown = row.locator("dd").inner_text().replace("−", "-").replace("–", "nan")
        assert float(shown) == pytest.approx(statistic["values"][i], rel=0.06), statistic["name"]
    rows = [[cell.strip() for cell in row.locator("td").all_inner_texts()] for row in detail.locator("tbody tr").all()]
    for column, side in ((0, "top_s"), (2, "top_t")):
        found = {row[1].lstrip("▸"): row[column] for row in rows if row[column]}
        k = data[side]["k"]
        listed = [data["strings"][j] for j in data[side]["places"][i * k : i * k + k]]
        assert sorted(found) == sorted(listed) and k == 5
        first = data[side]["p"][i * k]
        assert float(found[listed[0]].rstrip(" %")) == pytest.approx(100 * first, abs=0.06)
    assert sum(row[1].startswith("▸") for row in rows) == 1
    tab.mouse.move(5, 5)
    assert until(tab, lambda: "Point at a token" in detail.inner_text())


def test_a_point_clicked_in_the_scatter_finds_its_token_and_a_token_its_point(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    held = tab.locator(".t.held")
    for i in (
        data["quadrant"].index("3"),
        data["quadrant"].rindex("3", 0, 2000),
        data["quadrant"].rindex("2", 0, 2000),
    ):
        hover(tab, i)
        x, y = ring(tab)
        tab.mouse.click(x, y)
        assert until(tab, lambda: held.count() == 1)
        assert held.evaluate("node => node === document.activeElement")
        found = int(held.get_attribute("data-i"))
        assert data["quadrant"][found] == data["quadrant"][i]
        assert math.dist(ring(tab), (x, y)) < 3
        top, bottom = held.evaluate("n => [n.getBoundingClientRect().top, n.getBoundingClientRect().bottom]")
        assert 0 <= top < bottom <= 900 and held.get_attribute("aria-current") == "true"
        tab.mouse.move(5, 5)
        assert until(tab, lambda: "held" in tab.locator("#detail").inner_text())
        tab.keyboard.press("Escape")
        assert until(tab, lambda: held.count() == 0)


def test_a_point_on_another_page_turns_to_it(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    assert tab.locator(".t").count() <= 2500 < len(data["text"])
    last = data["quadrant"].rindex("3")
    while not tab.locator(f'.t[data-i="{last}"]').count():
        tab.click("#next")
    hover(tab, last)
    canvas = tab.locator("#scatter")
    place = [a - b for a, b in zip(ring(tab), canvas.bounding_box().values(), strict=False)]
    tab.select_option("#sort", "prompt")  # back to the first page
    tab.mouse.move(5, 5)
    canvas.click(position={"x": place[0], "y": place[1]})
    held = tab.locator(".t.held")
    assert until(tab, lambda: held.count() == 1)
    found = int(held.get_attribute("data-i"))
    assert data["quadrant"][found] == "3" and held.evaluate("node => node === document.activeElement")
    assert math.dist(ring(tab), [a + b for a, b in zip(place, canvas.bounding_box().values(), strict=False)]) < 3
    number = next(k for k, r in enumerate(data["rollouts"]) if r["first"] <= found < r["end"])
    assert held.evaluate("n => n.closest('article').querySelector('h2').textContent") == f"Rollout {number + 1}"


def test_rollouts_are_sorted_filtered_and_found(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    wrong = [i for i, r in enumerate(data["rollouts"]) if not r["right"]]

    def first():
        return int(tab.locator(".rollout h2").first.inner_text().split()[1]) - 1

    tab.select_option("#verdict", "wrong")
    assert first() == wrong[0] and f"of {len(wrong)} rollouts" in tab.locator("#where").inner_text()
    tab.select_option("#sort", "q3")
    q3 = [data["quadrant"][r["first"] : r["end"]].count("3") for r in data["rollouts"]]
    assert q3[first()] == max(q3[i] for i in wrong)
    tab.click("#order")
    assert q3[first()] == min(q3[i] for i in wrong)
    tab.select_option("#verdict", "")
    tab.select_option("#sort", "index")
    prompt = data["rollouts"][50]["prompt"]
    tab.fill("#find", prompt)
    tab.locator(".rollout").nth(2).wait_for(state="detached")
    assert tab.locator(".prompt").all_inner_texts() == [prompt, prompt]
    tab.fill("#find", "no such text")
    tab.locator(".empty").wait_for()
    tab.fill("#find", "")
    tab.locator(".rollout").first.wait_for()
    tab.select_option("#having", "1")
    assert "1" in data["quadrant"][data["rollouts"][first()]["first"] : data["rollouts"][first()]["end"]]
    tab.locator("#legend button", has_text="Q3").click()
    dim = tab.locator(".dimming .t.q4").first.evaluate(
        "async n => (await new Promise(r => setTimeout(r, 200)), getComputedStyle(n).opacity)"
    )
    assert float(dim) < 0.5 and tab.locator('#legend [aria-pressed="true"]').count() == 1


def test_the_keyboard_walks_over_tokens(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html", width=700)
    first = data["rollouts"][0]

    def at():
        return int(tab.evaluate("document.activeElement.dataset.i ?? -1"))

    assert tab.locator('.t[tabindex="0"]').count() == 1
    tab.focus(".t")
    for key, place in [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", first["end"] - 1),
        ("ArrowRight", first["end"]),
        ("ArrowLeft", first["end"] - 1),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("n", data["kept"].index("1", 1)),
        ("Home", 0),
    ]:
        tab.keyboard.press(key)
        assert until(tab, lambda place=place: at() == place), key
        assert (
            f"token {place - (first['end'] if place >= first['end'] else 0) + 1} of"
            in tab.locator("#detail").inner_text()
        )
    label = tab.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith(f"token {data['strings'][data['text'][0]]}, quadrant") and "entropy" in label
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("ArrowDown")
    assert until(tab, lambda: at() >= 20)  # the next line, of this rollout or of the one below
    tab.keyboard.press("ArrowUp")
    assert until(tab, lambda: at() < 20)
    assert tab.locator('.t[tabindex="0"]').count() == 1


def test_arrow_keys_work_on_load_and_walk_over_the_scatter(run, show):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    detail = tab.locator("#detail")
    tab.keyboard.press("ArrowDown")
    assert until(tab, lambda: detail.get_attribute("data-i") == "0")
    tab.keyboard.press("ArrowRight")
    assert until(tab, lambda: detail.get_attribute("data-i") == "1")
    tab.focus("#scatter")
    entropy, kl = (
        next(s["values"] for s in data["statistics"] if s["name"] == name) for name in ("entropy_s", "kl_rev")
    )
    ways = (("ArrowUp", kl, 1), ("ArrowDown", kl, -1), ("ArrowRight", entropy, 1), ("ArrowLeft", entropy, -1))
    for key, values, way in ways:
        before = int(detail.get_attribute("data-i"))
        tab.keyboard.press(key)
        assert until(tab, lambda before=before: int(detail.get_attribute("data-i")) != before), key
        assert way * (values[int(detail.get_attribute("data-i"))] - values[before]) > 0, key
        assert tab.evaluate("document.activeElement.id") == "scatter"
    i = detail.get_attribute("data-i")
    tab.keyboard.press("Enter")
    assert until(tab, lambda: tab.evaluate("document.activeElement.dataset.i") == i)


@pytest.mark.parametrize("width", [1280, 980, 640, 360])
def test_the_scatter_follows_its_window_and_nothing_runs_over(run, show, width):
    tab = show(run / "inspect.html")
    tab.set_viewport_size({"width": width, "height": 900})

    def fits():
        card, canvas = (tab.locator(name).bounding_box() for name in ("#plot", "#scatter"))
        inside = card["x"] <= canvas["x"] and canvas["x"] + canvas["width"] <= card["x"] + card["width"] <= width
        return inside and canvas["width"] > 0.8 * card["width"]

    assert until(tab, fits)
    assert not tab.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_what_is_shown_is_downloaded(run, show, tmp_path):
    data = data_of((run / "inspect.html").read_text())
    tab = show(run / "inspect.html")
    tab.select_option("#verdict", "wrong")
    with tab.expect_download() as started:
        tab.click("#csv")
    started.value.save_as(tmp_path / "tokens.csv")
    rows = list(csv.DictReader((tmp_path / "tokens.csv").read_text(encoding="utf-8-sig").splitlines()))
    wrong = [i for r in data["rollouts"] if r["right"] is False for i in range(r["first"], r["end"])]
    assert [json.loads(row["text_json"]) for row in rows] == [data["strings"][data["text"][i]] for i in wrong]
    for s in data["statistics"]:
        assert [float(row[s["name"]] or "nan") for row in rows] == pytest.approx(
            [s["values"][i] for i in wrong], nan_ok=True
        )
    assert sum(int(row["kept"]) for row in rows) == sum(data["kept"][i] == "1" for i in wrong)


def test_a_page_explains_itself_and_links_to_the_report_and_back(run, show):
    tab = show(run / "inspect.html")
    text = " ".join(tab.locator("#guide").inner_text().split())
    for said in (
        "The task",
        "864+394=",
        "Score",
        "1 - (1 - h)(1 - d)",
        "Across",
        "Up",
        "Color",
        "0.3 nats",
        "kept: the",
    ):
        assert said in text, said
    assert tab.locator("a.beside").get_attribute("href") == "report.html"
    assert 'href="inspect.html"' in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["inspect.html", "report.html"])
def test_light_and_dark_follow_the_system_until_chosen(run, show, name):
    body = "getComputedStyle(document.body).backgroundColor"
    light, dark = (show(run / name, scheme=scheme).evaluate(body) for scheme in ("light", "dark"))
    assert light != dark
    tab = show(run / name, scheme="light")
    tab.click("#theme")
    assert tab.evaluate(body) == light
    tab.click("#theme")
    assert tab.evaluate(body) == dark and "Dark" in tab.inner_text("#theme")


def test_nasty_tokens_are_text_and_nothing_else(tmp_path, show):
    path = tmp_path / "nasty.html"
    path.write_text(page.inspect_page(write_table(), NASTY[0]), encoding="utf-8")
    tab = show(path)
    assert tab.locator("img, iframe, object").count() == 0 and tab.title() == NASTY[0]
    texts = tab.locator(".t").all_text_contents()
    assert texts[0] == NASTY[0] and texts[1] == NASTY[1] and texts[2] == NASTY[2] and texts[4] == "שלום"
    assert texts[3] == "␀␛[31m" and texts[5] == "‹202E›evil‹2066›" and texts[7] == " ↵\n→\t" and texts[8] == NASTY[8]
    assert texts[11] == "·" and texts[12] == "‹D800›" and texts[13] == "{{ 7*7 }}"
    for i in range(len(NASTY)):
        hover(tab, i)
    assert tab.locator(".prompt").first.text_content() == NASTY[0]
    hover(tab, 0)
    assert "∞" in tab.locator("#detail .numbers").inner_text()


def test_statistics_without_a_teacher_are_shown_without_a_scatter(tmp_path, show):
    stats = tip.token_stats(torch.randn(2, 3, 128))
    path = tmp_path / "student.safetensors"
    save_statistics(path, stats, torch.full((2, 3), 97), Bytes())
    assert command.main(["inspect", str(path), "--output", str(tmp_path / "p.html"), "--quiet"]) == 0
    tab = show(tmp_path / "p.html")
    assert tab.locator(".t").count() == 6 and tab.locator("#plot").is_hidden()
    hover(tab, 1)
    assert "student entropy" in tab.locator("#detail").inner_text()


def test_two_hundred_rollouts_of_a_hundred_tokens_open_within_three_seconds(tmp_path, show):
    table = write_table(20_000, rollouts=200)
    path = tmp_path / "large.html"
    path.write_text(page.inspect_page(table, "large"), encoding="utf-8")
    drawn = "() => new Promise(r => requestAnimationFrame(() => setTimeout(() => r(performance.now()))))"
    assert min(show(path).evaluate(drawn) for _ in range(2)) < 3000
    tab = show(path)
    assert tab.locator(".t").count() <= 2500
    for _ in range(2):
        tab.click("#next")
    turning = "const t = performance.now(); document.getElementById('next').click(); document.body.offsetHeight"
    assert tab.evaluate(f"() => {{ {turning}; return performance.now() - t; }}") < 1000


def test_one_long_rollout_is_cut_into_pages(tmp_path, show):
    path = tmp_path / "long.html"
    path.write_text(page.inspect_page(write_table(6000, rollouts=1), "long"), encoding="utf-8")
    tab = show(path)
    assert "page 1 of 3" in tab.locator("#where").inner_text() and tab.locator(".t").count() == 2500
    tab.focus(".t")
    tab.keyboard.press("End")
    assert until(tab, lambda: tab.evaluate("document.activeElement.dataset.i") == "5999")
    assert "page 3 of 3" in tab.locator("#where").inner_text()


def test_report_and_comparison_draw_against_each_axis(run, tmp_path, show):
    output = tmp_path / "compare.html"
    assert command.main(["compare", str(run), "--output", str(output), "--quiet"]) == 0
    ink = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(v => v > 0)"
    image = "canvas => canvas.toDataURL()"
    for path, panels in ((run / "report.html", 6), (output, 4)):
        tab = show(path)
        canvases = tab.locator("canvas").all()
        assert len(canvases) == panels and all(canvas.evaluate(ink) for canvas in canvases)
        before = canvases[0].evaluate(image)
        tab.select_option("#axis", "tokens")
        tokens = canvases[0].evaluate(image)
        tab.select_option("#axis", "seconds")
        assert len({before, tokens, canvases[0].evaluate(image)}) == 3
        canvases[0].hover()
        assert "Accuracy" in canvases[0].get_attribute("aria-label")
