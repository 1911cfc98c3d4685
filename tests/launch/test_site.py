from pathlib import Path

import pytest

from moe_bench.errors import RecipeError
from moe_bench.launch.site import Site, find_site, load_site
from moe_bench.spec.load import UnknownNameError

SITES = Path(__file__).parents[2] / "slurm" / "sites"


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_site_of_ours_is_valid(path: Path) -> None:
    load_site(path)


def test_our_sites_show_every_runtime() -> None:
    assert {load_site(path).runtime for path in SITES.glob("*.yaml")} == {"bare", "pyxis", "apptainer"}


def test_a_mistake_in_a_site_names_file_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("partition: batch\nacount: me\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2: acount: unknown key"):
        load_site(path)


def test_the_site_named_after_the_cluster_is_taken(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("partition: any\n")
    (tmp_path / "alps.yaml").write_text("partition: normal\n")
    assert find_site(tmp_path, asked=None, cluster="alps") == ("alps", Site(partition="normal"))
    assert find_site(tmp_path, asked=None, cluster="eos") == ("default", Site(partition="any"))
    assert find_site(tmp_path, asked=None, cluster=None) == ("default", Site(partition="any"))


def test_a_site_that_is_asked_for_goes_before_the_cluster(tmp_path: Path) -> None:
    for name in ("alps", "eos"):
        (tmp_path / f"{name}.yaml").write_text(f"partition: {name}\n")
    assert find_site(tmp_path, asked="eos", cluster="alps")[1].partition == "eos"
    path = str(tmp_path / "alps.yaml")
    assert find_site(Path("/nowhere"), asked=path, cluster=None) == (path, Site(partition="alps"))


def test_an_unknown_site_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError, match="there is no site 'defualt'; did you mean 'default'"):
        find_site(SITES, asked="defualt", cluster=None)
