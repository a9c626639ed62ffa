import threading

import pytest

from coserve.errors import Conflict, FailedPrecondition, InvalidRequest, ModelNotFound, NotFound
from coserve.lora.registry import AdapterRegistry, AdapterVersion, check_adapter_name


def version(name="sql", number=1, **fields):
    return AdapterVersion(name, number, f"digest-{name}-{number}", f"/a/{name}/{number}", 8, 100, **fields)


@pytest.fixture
def registry():
    return AdapterRegistry({"base", "coserve-demo"})


def test_a_name_means_its_newest_version(registry):
    registry.publish(version(number=1))
    before = registry.resolve("sql")
    registry.publish(version(number=2))
    assert registry.resolve("sql").version == 2
    assert registry.resolve("sql@1") is before and before.digest == "digest-sql-1"
    assert [v.version for v in registry.versions("sql")] == [1, 2]
    assert registry.next_version("sql") == 3 and registry.next_version("new") == 1


@pytest.mark.parametrize(
    "model", ["nope", "sql@9", "sql@", "sql@x", "sql@-1", "sql@1@1", "sql@\u00b9", "SQL", ""]
)
def test_unknown_models_are_not_found_and_never_the_base(registry, model):
    registry.publish(version())
    with pytest.raises(ModelNotFound) as caught:
        registry.resolve(model)
    assert caught.value.param == "model"


def test_versions_that_are_not_ready_do_not_resolve(registry):
    registry.publish(version(status="loading"))
    with pytest.raises(FailedPrecondition, match="sql@1 is loading"):
        registry.resolve("sql")
    assert registry.get("sql").status == "loading"
    registry.publish(version(number=2))
    assert registry.resolve("sql").version == 2


def test_a_version_is_immutable(registry):
    registry.publish(version())
    with pytest.raises(Conflict, match="sql@1 exists already"):
        registry.publish(version())


def test_publishing_without_pointing(registry):
    registry.publish(version(number=1))
    registry.publish(version(number=2), make_current=False)
    assert registry.resolve("sql").version == 1 and registry.get("sql", 2).version == 2


def test_rollback_points_back_and_numbers_go_on(registry):
    for number in (1, 2, 3):
        registry.publish(version(number=number))
    assert registry.rollback("sql", 1).version == 1
    assert registry.resolve("sql").version == 1 and registry.resolve("sql@3").version == 3
    assert registry.next_version("sql") == 4
    with pytest.raises(NotFound):
        registry.rollback("sql", 7)


def test_removing_a_version_or_a_name(registry):
    for number in (1, 2, 3):
        registry.publish(version(number=number))
    assert [v.version for v in registry.remove("sql", 3)] == [3]
    assert registry.resolve("sql").version == 2
    assert registry.next_version("sql") == 4
    assert [v.version for v in registry.remove("sql")] == [1, 2]
    with pytest.raises(ModelNotFound):
        registry.resolve("sql")
    with pytest.raises(NotFound):
        registry.remove("sql")
    assert registry.current() == [] and registry.all_versions() == []


def test_lists(registry):
    for name, number in (("b", 1), ("a", 1), ("a", 2)):
        registry.publish(version(name, number))
    assert [v.full_name for v in registry.current()] == ["a@2", "b@1"]
    assert len(registry.all_versions()) == 3


@pytest.mark.parametrize("name", ["sql", "ft:base:coserve::abc1", "A.b_c-9", "x" * 128])
def test_good_names(name):
    check_adapter_name(name)
    assert AdapterRegistry(()).next_version(name) == 1


@pytest.mark.parametrize("name", ["", "a/b", "a@1", "..", ".hidden", "a b", "ä", "x" * 129, "a\n", "a\0"])
def test_bad_names(name, registry):
    with pytest.raises(InvalidRequest, match="must be 1 to 128"):
        registry.publish(version(name))


def test_the_base_names_are_taken(registry):
    with pytest.raises(InvalidRequest, match="name of the base model"):
        registry.publish(version("coserve-demo"))


def test_readers_never_see_half_a_swap(registry):
    registry.publish(version(number=1))
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            found = registry.resolve("sql")
            seen.add((found.version, found.digest))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(2, 60):
        registry.publish(version(number=number))
    stop.set()
    reader.join()
    assert all(digest == f"digest-sql-{number}" for number, digest in seen)
