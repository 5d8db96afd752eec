import pytest

from fastreid_uns.registry import Registry, did_you_mean, keywords


def make() -> Registry:
    registry = Registry("FRUIT", reserved=["WEIGHT"])

    @registry.register()
    class Apple:
        def __init__(self, size, *, colour="red", seeds=5):
            self.size, self.colour, self.seeds = size, colour, seeds

    @registry.register()
    class Crab(Apple):
        def __init__(self, size, *, sour=True, **kwargs):
            super().__init__(size, **kwargs)
            self.sour = sour

    return registry


def test_build_takes_upper_case_keys_and_ignores_reserved_ones():
    apple = make().build({"NAME": "Apple", "COLOUR": "green", "WEIGHT": 2.0}, 7)
    assert (apple.size, apple.colour, apple.seeds) == (7, "green", 5)


def test_schema_of_a_child_that_passes_keywords_on_holds_those_of_the_parent():
    assert make().schema("Crab") == {"colour": "red", "seeds": 5, "sour": True}


def test_unknown_name_is_answered_with_the_near_one_and_all_known_ones():
    with pytest.raises(KeyError, match=r"'Aple' is unknown; did you mean Apple\? Known: Apple, Crab.*PLUGINS"):
        make().get("Aple")


def test_unknown_key_is_answered_with_the_near_one():
    with pytest.raises(KeyError, match=r"Apple: unknown key COLOR; did you mean COLOUR\?"):
        make().build({"NAME": "Apple", "COLOR": "green"}, 1)


def test_the_same_name_from_two_modules_is_refused_and_both_are_named():
    registry = make()
    stranger = type("Apple", (), {"__module__": "other.module"})
    with pytest.raises(KeyError, match=r"Apple is registered by .*test_registry and by other\.module"):
        registry.register(stranger)


def test_registering_again_after_a_reload_replaces_the_class():
    registry = make()
    again = type("Apple", (), {"__module__": registry.get("Apple").__module__})
    again.__qualname__ = registry.get("Apple").__qualname__
    registry.register(again)
    assert registry.get("Apple") is again


def test_keywords_of_a_function():
    def photos(*, root="x", size):
        return root, size

    found = keywords(photos)
    assert found["root"] == "x"
    assert list(found) == ["root", "size"]


def test_types_are_the_annotations_as_they_are_written():
    registry = Registry("FRUIT")

    @registry.register()
    class Pear:
        def __init__(self, *, root: str, size: "int | None" = None, name="pear"):
            pass

    assert registry.types("Pear") == {"root": "str", "size": "int | None", "name": ""}


def test_a_near_name_is_found_whatever_its_case():
    assert did_you_mean("solvr", ["SOLVER", "MODEL"]) == "; did you mean SOLVER?"
    assert did_you_mean("photos", ["SOLVER"]) == "."
