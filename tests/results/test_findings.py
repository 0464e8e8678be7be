"""The findings: what is told, against the verdicts on disk, and averages against what the test computes by hand."""

import csv
import html
import io
import re

import pytest

from results import findings, findings_page, paper_tables, papers, report
from results.publish import publish
from results.rebuilt import rebuild

COLUMNS = "paper,table,row,label,model,head,framework,dataset,num_classes,input_size,cost_input_size,params_m,gflops,"
COLUMNS += "miou,other,derived,reported_by,note"
ROWS = """
mine,1,1,Ours-S,ours_s,upernet,UPerNet,ADE20K,19,64x64,,10.0,4.0,50,,,own,
mine,1,2,Ours-B,ours_b,upernet,UPerNet,ADE20K,19,64x64,,30.0,8.0,52,,,own,
mine,1,3,Theirs,theirs,upernet,UPerNet,ADE20K,150,64x64,,50.0,16.0,48,,,other,
mine,1,4,Mean,,,UPerNet,ADE20K,,64x64,,,,,DELTAS,"{""own"": [1, 2], ""others"": [3]}",own,
mine,2,1,Theirs,theirs,upernet,UPerNet,ADE20K,150,64x64,,50.0,16.0,48,,,other,
mine,2,2,Unknown,,,,ImageNet-1K,1000,64x64,,7.0,1.0,,,,other,
mine,2,3,Boxes,,,Mask R-CNN,COCO,,64x64,,44.0,180,,,,own,
mine,2,4,Resized,resized,,,ImageNet-1K,1000,64x64,96x96,5.0,3.0,,,,other,
""".strip().splitlines()
DELTAS = "delta_params=-60.0%;delta_gflops=-62.5%;delta_miou=+3.00"
VERDICTS = """
mine,1,3,params_m,misprint,it is Ours-X's
mine,2,1,params_m,misprint,it is Ours-X's
mine,2,2,params_m,cannot be known,no layout
mine,2,2,gflops,cannot be known,no depth
mine,2,4,gflops,other size,belongs to 96x96
mine,2,4,input_size,misprint,96x96 fits
"""
KIND = re.compile(r'<div id="kind-([\w-]+)-part" data-part>(.*?)</div>\s*(?=<div id="kind|</section>)', re.DOTALL)


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "mine.csv").write_text("\n".join([COLUMNS, *ROWS]).replace("DELTAS", DELTAS))
    (folder / papers.CONVENTIONS).write_text("paper,title,tables,convention,text\nmine,Mine,1 2,mine,as we do\n")
    (folder / papers.VERDICTS).write_text("paper,table,row,column,verdict,evidence" + VERDICTS)
    loaded = papers.load(folder=folder)
    assert loaded.problems == []
    return loaded


@pytest.fixture
def ledger(counted):
    """Ours as printed; theirs with the printed 150 classes and, other than printed, with ours."""

    def network(name, params, macs, classes, size=64, head="upernet"):
        content = {"params": params * 1e6, "macs": macs * 1e9, "classes": classes, "size": size, "head": head}
        return counted(name, **content, key=f"{name}-{classes}-{size}")

    ours = [network("ours_s", 10, 4, 19), network("ours_b", 30, 9, 19)]
    return [
        *ours,
        network("theirs", 41, 16, 150),
        network("theirs", 40, 12, 19),
        network("resized", 5, 3, 1000, 96, None),
    ]


def told(loaded, records):
    return findings.find(rebuild(loaded, records), loaded)


def test_one_finding_for_one_number_in_two_tables_with_what_is_true(mine, ledger):
    found = told(mine, ledger)
    size, params = sorted(found.of("misprint"), key=lambda finding: finding.column)
    assert (params.printed, params.counted.value, params.places[0][1]) == ("50.0", 41, "Theirs, UPerNet")
    assert params.difference == pytest.approx(-18)
    assert [table.table for table, _ in params.places] == ["1", "2"]
    assert (size.column, size.printed, size.evidence) == ("input_size", "64x64", "96x96 fits")
    (other,) = found.of("other size")  # It comes out, at another size than the printed one.
    assert (other.printed, other.size, other.counted.value) == ("3.0", "96x96", 3)
    (differs,) = found.of("differs")
    assert (differs.places[0][1], differs.printed, differs.counted.value) == ("Ours-B, UPerNet", "8.0", 9)
    assert [(row.name, [*row.cells]) for row in found.lost] == [("Unknown", ["params_m", "gflops"])]
    assert [(table.table, names) for table, names, _ in found.carried] == [("2", ["Boxes"])]


def test_an_average_is_recomputed_from_print_and_with_all_counted_alike(mine, ledger):
    by_column = {average.column: average for average in told(mine, ledger).averages}
    params, flops, miou = (by_column[column] for column in ("params_m", "gflops", "miou"))
    # (10 + 30) / 2 against 50 printed, 41 with the 150 classes of the print, 40 with our 19
    assert (params.cell.recomputed, params.cell.measured.value) == ("-60.0%", pytest.approx((20 / 41 - 1) * 100))
    assert (params.alike.value, params.alike.reason) == (pytest.approx(-50), "all rows counted with 19 classes")
    assert params.claim == "Stands, but with 10.0 points less than printed"
    assert params.made_of == "misprint: Theirs; its own networks are printed with 19 classes, the others with 150"
    # (4 + 9) / 2 against 12
    assert flops.alike.value == pytest.approx((6.5 / 12 - 1) * 100)
    assert (miou.alike.value, miou.claim) == (None, "Follows from the printed rows; no training has repeated it here")
    assert params.stands
    assert miou.stands is None


def test_a_claim_falls_where_the_sign_turns_and_is_open_where_a_row_was_not_counted(mine, ledger, counted):
    small = counted("theirs", params=15e6, macs=12e9, classes=19, size=64, head="upernet", key="small")
    ours, theirs, resized = ledger[:2], ledger[2], ledger[4]
    found = {average.column: average for average in told(mine, [*ours, theirs, small, resized]).averages}
    assert (found["params_m"].claim, found["params_m"].stands) == ("Does not stand", False)
    found = {average.column: average for average in told(mine, [*ours, theirs]).averages}
    assert found["params_m"].alike.value is None
    assert found["params_m"].alike.reason == "Theirs was not counted with 19 classes"
    assert found["params_m"].claim == "Follows from the printed rows; not all of its rows are counted here"


def test_files_and_page_say_the_same(mine, ledger, tmp_path):
    found = told(mine, ledger)
    markdown, lines = (path.read_text() for path in findings_page.write(found, tmp_path))
    source = findings_page.render(found, title="A & B", report="report.html")
    page = html.unescape(source)
    for evidence in ("it is Ours-X's", "no layout", "belongs to 96x96", "96x96 fits"):
        assert page.count(evidence) == markdown.count(evidence) == lines.count(evidence) == 1
    for line in findings_page.told(found):
        assert line in page
        assert line in markdown
    assert "Of the 14 parameters and FLOPs that the papers print, 10 were counted here" in page
    assert "As printed: 6. Different for a known reason: 3 (and 2 more, known without a count)." in page
    assert "No training here has repeated any of the 4 accuracies" in page
    assert "Findings: A &amp; B" in source
    rows = {(row["kind"], row["number"]): row for row in csv.DictReader(io.StringIO(lines))}
    assert {kind for kind, _ in rows} == {"misprint", "other size", "cannot be known", "differs", "average"}
    misprint, average = rows["misprint", "params_m"], rows["average", "params_m"]
    assert (misprint["tables"], misprint["printed"], misprint["counted"]) == ("1, 2", "50.0", "41.0")
    assert (average["from_printed_rows"], float(average["counted_alike"])) == ("-60.0%", pytest.approx(-50))
    assert rows["cannot be known", "params_m"]["counted"] == ""
    assert '<td class="number unmeasured">not counted</td>' in page
    nothing = told(mine, [])
    assert findings_page.write(nothing, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_the_page_has_every_verdict_of_the_papers_under_its_heading(counted, tmp_path):
    """Those of HRViT and HRFormer, read from the file by this test; of what they are on nothing is counted."""
    records = [counted(name, params=1e6, classes=1000) for name in ("hrvit_b1", "hrformer_tiny")]
    loaded = papers.load()
    tables = rebuild(loaded, records)
    found = findings.find(tables, loaded)
    source = findings_page.render(found, title="A", report=report.REPORT)
    shown = {kind.replace("-", " "): html.unescape(text) for kind, text in KIND.findall(source)}
    with (papers.FOLDER / papers.VERDICTS).open(newline="") as file:
        verdicts = [line for line in csv.DictReader(file) if line["paper"] in ("hrvit", "hrformer")]
    assert {line["verdict"] for line in verdicts} <= shown.keys()
    assert [line for line in verdicts if line["evidence"] not in shown[line["verdict"]]] == []
    # Tables 9 and S9 of HRViT print one misprint; the two sizes of HRFormer's Table 6 are one, too.
    assert shown["misprint"].count("59.9 M is Swin-T's count (59,940,518 with the auxiliary head)") == 1
    (row,) = re.findall(r"<tr[^>]*>\s*<th[^>]*>CSWin-T, UPerNet</th>.*?</tr>", shown["misprint"], re.DOTALL)
    cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row)]
    assert cells[:6] == ["Params (M)", "59.9", "not run", "", "HRViT", "9, S9"]
    assert "ViT-B/16; ViT-L/16" in shown["misprint"]
    assert shown["misprint"].count("384x384 belongs to the row's FLOPs and accuracy") == 1
    # A publication takes the page along, and what it links to is there without the report.
    (tmp_path / findings_page.PAGE).write_text(source)
    files = [*paper_tables.write(tables, loaded, tmp_path / "tables").files, tmp_path / findings_page.PAGE]
    files += findings_page.write(found, tmp_path / "tables")
    target = publish(tmp_path, records, files, tmp_path / "published" / "a", title="A")
    links = set(re.findall(r'href="([^"#]+)[^"]*"', (target / findings_page.PAGE).read_text()))
    assert {"README.md", "tables/papers/hrvit_table_9.md", "tables/papers/conventions.md"} <= links
    assert [link for link in links if not (target / link).is_file()] == []
    assert "[Findings](tables/papers/findings.md)" in (target / "README.md").read_text()
