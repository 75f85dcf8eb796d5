from pathlib import Path

import pytest

from edgepress.pipeline.recipe import BUILT_IN, RecipeError, load_recipe, parse_recipe


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_parse(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert "schema = 1" in recipe.text


def test_default_calibrates_then_quantizes() -> None:
    assert [step.name for step in load_recipe("default").passes] == ["calibrate", "quantize-int8"]
    assert load_recipe("none").passes == ()


def test_everything_at_once() -> None:
    recipe = parse_recipe(
        """
schema = 1
[[pass]]
name = "calibrate"
method = "percentile"
percentile = 99      # a whole number where a number is wanted

[budget]
latency_ms = 20
size_bytes = 300000
[preprocess]
mean = [0.5, 0.5, 0.5]
"""
    )
    (step,) = recipe.passes
    assert getattr(step, "percentile") == 99.0  # noqa: B009
    assert recipe.budget.latency_ms == 20.0
    assert recipe.budget.size_bytes == 300_000
    assert recipe.budget.sqnr_db is None
    assert recipe.preprocess is not None
    assert recipe.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("schema = 1\npases = 3\n", 2, ("'pases'", "'pass'")),
        ("schema = 2\n", 1, ("schema is 2", "update edgepress")),
        ("\n", 1, ("schema is None", "schema = 1")),
        ("schema = true\n", 1, ("schema is True", "schema = 1")),
        ("schema = 1\n[[pass]\n", 2, ("not TOML",)),
        ("schema = 1\npass = 3\n", 2, ("[[pass]]",)),
        ("schema = 1\n[[pass]]\nmethod = 'mse'\n", 2, ("needs a name",)),
        ("schema = 1\n[[pass]]\nname = 'calibrat'\n", 3, ("'calibrat'", "calibrate")),
        (
            "schema = 1\n[[pass]]\nname='quantize-int8'\n[[pass]]\nname='calibrate'\nmetod='mse'\n",
            6,
            ("'metod'", "'method'"),
        ),
        ("schema = 1\n[[pass]]\nname='calibrate'\nmethod = 3\n", 4, ("method is 3", "a string")),
        (
            "schema = 1\n[[pass]]\nname='calibrate'\npercentile = 'x'\n",
            4,
            ("percentile is 'x'", "a number"),
        ),
        (
            "schema = 1\n[[pass]]\nname = 'prune-channels'\namount = { a = 'x' }\n",
            4,
            ("{'a': 'x'}", "a number or a table in which each value is a number."),
        ),
        (
            "schema = 1\n[[pass]]\nname = 'prune-channels'\namount = 'x'\n",
            4,
            ("'x'", "a number or a table in which"),
        ),
        ("schema = 1\n[budget]\nlatency = 3\n", 3, ("'latency'", "'latency_ms'")),
        ("schema = 1\n[budget]\nlatency_ms = true\n", 3, ("True", "a number")),
        ("schema = 1\n[budget]\nsize_bytes = -1\n", 3, ("not negative",)),
        ("schema = 1\n[budget]\nlatency_ms = nan\n", 3, ("nan", "not negative")),
        ("schema = 1\n[budget]\nraise_to = ['int4']\n", 3, ("'int4'", "'int16' and 'float'")),
        ("schema = 1\n[budget]\nraise_to = 'int16'\n", 3, ("raise_to", "a list of a string")),
        ("schema = 1\n\n[preprocess]\nstd = [0.0]\n", 3, ("std",)),
        ("schema = 1\n\n[preprocess]\nmeen = [0.0]\n", 4, ("'meen'", "'mean'")),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="my.toml")
    message = str(caught.value)
    assert message.startswith(f"my.toml:{line}: ")
    for word in words:
        assert word in message
    assert message.endswith((".", "?"))
    assert "?." not in message


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean default"):
        load_recipe("defualt")
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(str(tmp_path / "bytes.toml"))
    mine = tmp_path / "mine.toml"
    mine.write_text("schema = 1\n")
    assert load_recipe(str(mine)).name == "mine"
