"""The configuration: old defaults, clear refusals, and a host program's other sections left in peace."""

import pytest
import yaml

from entropy_fast.config import Config
from entropy_fast.errors import InputError


def test_defaults_are_the_proposals():
    config = Config.from_dict(None)
    assert config.entropy.unit == "sequence"
    assert config.entropy.include_eos is True
    assert config.entropy.length_normalize_deltah1 is False
    assert config.importance_sampling.method == "snis"
    assert config.generation.temperature == 1.0


def test_the_proposals_yaml_is_read(tmp_path):
    path = tmp_path / "entropy.yaml"
    path.write_text('entropy:\n  unit: "per_token"\n  include_eos: false\nlearning_rate: 1e-5\n')
    config = Config.from_yaml(path)
    assert config.entropy.unit == "per_token"
    assert config.entropy.include_eos is False
    assert config.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("switches", "method"),
    [
        ({}, "snis"),
        ({"use_snis": False}, "is"),
        ({"use_psis": True}, "psis"),
        ({"is_mode": "clip", "clip_c": 3}, "clip"),
    ],
)
def test_switches_add_up_to_a_weighting(switches, method):
    assert Config.from_dict({"importance_sampling": switches}).importance_sampling.method == method


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"entropi": {}}, "unknown configuration key entropi; did you mean entropy?"),
        ({"entropy": {"includ_eos": True}}, "did you mean entropy.include_eos?"),
        ({"entropy": {"zzz": True}}, "known: control_variate"),
        ({"entropy": {"unit": "token"}}, "entropy.unit must be one of sequence, per_token, got 'token'"),
        ({"entropy": {"include_eos": "yes"}}, "entropy.include_eos must be true or false, got 'yes'"),
        ({"entropy": 3}, "entropy must be a section"),
        ({"entropy": {"estimator": "prefix"}}, "needs entropy.integrand: rao_blackwell"),
        ({"entropy": {"eos_token_ids": "2"}}, "must be an integer or a list of integers"),
        ({"generation": {"temperature": 0}}, "generation.temperature must be above 0, got 0.0"),
        ({"generation": {"top_p": 1.5}}, r"generation.top_p must be in \(0, 1\]"),
        ({"importance_sampling": {"clip_c": -1}}, "clip_c must be above 0"),
        ({"importance_sampling": {"snapshot_device": "gpu"}}, "snapshot_device must be same, cpu or cuda, got 'gpu'"),
        ({"importance_sampling": {"use_snis": 1}}, "use_snis must be true or false"),
        ({"memory_config": {"microbatch_size": 0}}, "microbatch_size must be at least 1 or null"),
        ({"memory_config": {"packing": 1}}, "memory_config.packing must be one of auto, true, false, got 1"),
        ({"memory_config": {"packing": "automatic"}}, r"got 'automatic' \(did you mean auto\?\)"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ([1], "must be a mapping"),
    ],
)
def test_slips_are_refused_by_name(mapping, message):
    with pytest.raises(InputError, match=message):
        Config.from_dict(mapping)


def test_a_host_programs_own_sections_pass_but_a_misspelling_does_not():
    host = {"model_config": {"a": 1}, "generation": {"temperature": 0.7, "do_sample": True}, "batch_config": {"E": 8}}
    assert Config.from_dict(host, strict=False).generation.temperature == 0.7
    with pytest.raises(InputError, match="did you mean generation.temperature"):
        Config.from_dict({"generation": {"temperatur": 0.7}}, strict=False)
    with pytest.raises(InputError, match="did you mean importance_sampling"):
        Config.from_dict({"importance_samplin": {}}, strict=False)


def test_override_and_back():
    config = Config().override(["entropy.unit=per_token", "learning_rate=2e-5", "entropy.eos_token_ids=[1, 2]"])
    assert config.entropy.unit == "per_token"
    assert config.learning_rate == 2e-5
    assert config.entropy.eos_token_ids == (1, 2)
    assert Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    for bad in ("entropy.unit", "a.b.c=1", "learning_rate.x=1"):
        with pytest.raises(InputError):
            Config().override([bad])


def test_bad_yaml_is_one_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("entropy: [1,")
    with pytest.raises(InputError, match="is not valid YAML") as error:
        Config.from_yaml(path)
    assert "\n" not in str(error.value)
