"""CUDA's allocator expands its segments, unless somebody has set it otherwise; which of both is so is said."""

import pytest

from lorakit.hardware import allocator


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in allocator.SETTINGS:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.platform, "release", lambda: "6.8.0-45-generic")


def test_where_nobody_has_set_it_segments_expand_and_the_run_says_so():
    allocator.use_expandable_segments()
    assert allocator.allocator_settings() == "PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert allocator.describe_allocator() == "memory of the card: in expandable segments"


@pytest.mark.parametrize("name", allocator.SETTINGS)
def test_a_users_own_setting_stays_and_is_named(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    allocator.use_expandable_segments()
    assert allocator.allocator_settings() == f"{name}=max_split_size_mb:128"
    assert allocator.describe_allocator() == f"memory of the card: as {name}=max_split_size_mb:128 says"


@pytest.mark.parametrize(("platform", "release"), [("win32", "10"), ("linux", "5.15.153.1-microsoft-standard-WSL2")])
def test_where_it_cannot_be_nothing_is_set(platform, release, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.platform, "release", lambda: release)
    allocator.use_expandable_segments()
    assert allocator.allocator_settings() == ""
    assert allocator.describe_allocator() == "memory of the card: by torch's defaults"
