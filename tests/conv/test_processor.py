"""Which CPU this is: told apart where a virtual machine gives two generations one name."""

import pytest
import torch

from psgrad.conv import processor as module
from psgrad.conv.processor import Processor, halves_long_vectors, processor, short_vectors

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 2
model name\t: AMD EPYC

processor\t: 1
cpu family\t: 99
model name\t: another
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of this family with these instructions."""

    def machine(family, instructions):
        path = tmp_path / "cpuinfo"
        path.write_text(CPUINFO.format(family=family))
        monkeypatch.setattr(module, "CPUINFO", path)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        processor.cache_clear()

    yield machine
    processor.cache_clear()


def test_the_first_of_its_cores_with_what_tells_generations_apart(machine):
    machine(26, "AVX512")
    new = processor()
    assert new == Processor("AuthenticAMD", "AMD EPYC", "cpu family 26, model 2", "AVX512")
    assert not short_vectors()
    assert not halves_long_vectors()
    machine(25, "AVX2")
    assert processor() != new
    assert short_vectors()
    assert not halves_long_vectors()
    machine(25, "AVX512")
    assert halves_long_vectors()


def test_a_system_that_does_not_tell(machine, monkeypatch, tmp_path):
    machine(26, "AVX2")
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "none")
    processor.cache_clear()
    assert processor().name
    assert processor() == Processor("", processor().name, "", "AVX2")


def test_a_system_that_will_not_tell(machine, monkeypatch, tmp_path):
    machine(26, "AVX512")
    monkeypatch.setattr(module, "CPUINFO", tmp_path)  # a folder: not to be read by root either
    processor.cache_clear()
    assert processor().vendor == ""


def test_a_name_in_another_encoding(machine, tmp_path):
    machine(26, "AVX512")
    (tmp_path / "cpuinfo").write_bytes(b"vendor_id\t: AuthenticAMD\nmodel name\t: \xa9 9000\n")
    assert processor().vendor == "AuthenticAMD"
    assert processor().name.endswith(" 9000")
