"""The table of families in docs/models.md is that of the program; run this file to write it anew."""

from pathlib import Path

from policies.hf.families import FAMILIES, table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- families -->\n", "<!-- end -->\n"


def rendered() -> str:
    rows = table()
    head = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]) + "\n"
    return head + "".join(
        "| " + " | ".join([f"`{row['model_type']}`", *list(row.values())[1:]]) + " |\n" for row in rows
    )


def test_the_page_has_the_table_of_the_program() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0] == rendered()


def test_rows_say_what_families_are() -> None:
    rows = {row.pop("model_type"): row for row in table()}
    assert set(rows) == set(FAMILIES)
    assert rows["nemotron"] == {"attention": "heads", "matrices": "2", "experts": "no", "tied": "no"}
    assert rows["gemma"]["tied"] == "yes"
    assert rows["glm_moe_dsa"] == {"attention": "MLA, indexer", "matrices": "3", "experts": "yes", "tied": "no"}
    assert rows["mamba2"] == {"attention": "Mamba-2", "matrices": "none", "experts": "no", "tied": "no"}
    assert rows["falcon_h1"]["attention"] == "heads beside Mamba-2"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + rendered() + END + rest.partition(END)[2], encoding="utf-8")
