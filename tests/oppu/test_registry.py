"""The adapter registry: one suite on a folder, on ``memory://``, and where moves raise and writes may tear."""

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from oppu.clock import ManualClock
from oppu.errors import AdapterUnreadable, ConfigError, TransientError
from oppu.lm.port import AdapterRef
from oppu.privacy import UserHash
from oppu.registry import CONFIG, MANIFEST, WEIGHTS, AdapterRegistry
from oppu.values import BaseId, UserId
from tests.oppu.brittle import BrittleFileSystem
from tests.oppu.registry_support import BASE, HASH, REF, SETUP, USER, assert_same, opened, tensors, write


@pytest.fixture(params=["folder", "memory", "brittle"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "adapters") if request.param == "folder" else f"{request.param}://{uuid.uuid4().hex}"
    BrittleFileSystem.mend()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def registry(url: str, clock: ManualClock) -> AdapterRegistry:
    return opened(url, clock=clock)


@pytest.fixture
def brittle() -> Iterator[AdapterRegistry]:
    yield opened(f"brittle://{uuid.uuid4().hex}")
    BrittleFileSystem.mend()


def change(url: str, registry: AdapterRegistry, name: str, content: bytes | None) -> None:
    """Alter a written file behind the registry's back."""
    fs, _ = fsspec.core.url_to_fs(url)
    path = f"{registry.path(REF)}/{name}"
    fs.rm_file(path) if content is None else fs.pipe_file(path, content)


def read(url: str, registry: AdapterRegistry, name: str) -> bytes:
    return bytes(fsspec.core.url_to_fs(url)[0].cat_file(f"{registry.path(REF)}/{name}"))


def test_what_is_written_is_read(url: str, registry: AdapterRegistry) -> None:
    written = write(registry)
    assert written.path == registry.path(REF)
    assert_same(registry.load(REF), tensors())
    reader = AdapterRegistry(url, base=BASE, user_hash=UserHash("key"))
    assert_same(reader.load(REF), tensors())
    manifest = reader.manifest(REF)
    assert (manifest["user"], manifest["epoch"], manifest["version"], manifest["base"]) == (HASH(USER), 1, 3, BASE)
    assert (manifest["parent"], manifest["trained_through"], manifest["token"]) == (2, 40, 9)
    assert manifest["metrics"] == {"loss": 1 / 3, "steps": 4.0}


def test_no_path_or_file_tells_the_user(url: str, registry: AdapterRegistry) -> None:
    write(registry, weights=tensors())
    assert HASH(USER) in registry.path(REF)
    assert USER not in registry.path(REF)
    for name in (CONFIG, WEIGHTS, MANIFEST):
        content = read(url, registry, name)
        assert USER.encode() not in content
        assert json.dumps(USER).encode() not in content


def test_a_version_is_written_once(registry: AdapterRegistry) -> None:
    write(registry)
    with pytest.raises(AdapterUnreadable, match="never written twice"):
        write(registry, weights=tensors(1))
    assert_same(registry.load(REF), tensors())


def test_a_torn_folder_is_not_taken_over(url: str, registry: AdapterRegistry) -> None:
    write(registry)
    change(url, registry, MANIFEST, None)
    with pytest.raises(AdapterUnreadable, match="never written twice"):
        write(registry)


def test_a_reader_cannot_write(url: str) -> None:
    with pytest.raises(ConfigError, match="adapter configuration"):
        write(AdapterRegistry(url, base=BASE, user_hash=HASH))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(registry: AdapterRegistry, bad: float) -> None:
    weights = tensors()
    next(iter(weights.values()))[0, 0] = bad
    with pytest.raises(AdapterUnreadable, match="finite"):
        write(registry, weights=weights)
    assert registry.versions(USER, 1) == []


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_missing_file_is_unreadable(url: str, registry: AdapterRegistry, name: str) -> None:
    write(registry)
    change(url, registry, name, None)
    with pytest.raises(AdapterUnreadable, match=f"{name} is missing"):
        registry.load(REF)


def test_an_unknown_version_is_unreadable(registry: AdapterRegistry) -> None:
    with pytest.raises(AdapterUnreadable, match="missing"):
        registry.load(REF)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_unreadable(url: str, registry: AdapterRegistry, name: str, keep: float) -> None:
    write(registry)
    content = read(url, registry, name)
    change(url, registry, name, content[: int(keep * len(content))])
    with pytest.raises(AdapterUnreadable):
        registry.load(REF)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_file_that_grew_is_unreadable_and_not_read_to_its_end(url: str, registry: AdapterRegistry, name: str) -> None:
    write(registry)
    content = read(url, registry, name)
    change(url, registry, name, content + b"x" * (2 * 2**20))
    with pytest.raises(AdapterUnreadable):
        registry.load(REF)


def test_a_file_larger_than_memory_is_unreadable(tmp_path: Path) -> None:
    registry = opened(str(tmp_path))
    write(registry)
    with Path(registry.path(REF), WEIGHTS).open("r+b") as file:
        file.truncate(2**42)  # sparse
    with pytest.raises(AdapterUnreadable, match="more bytes, expected"):
        registry.load(REF)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_one_file_that_cannot_be_opened_is_unreadable_and_nothing_to_wait_for(tmp_path: Path, name: str) -> None:
    registry = opened(str(tmp_path))
    write(registry)
    file = Path(registry.path(REF), name)
    file.unlink()
    file.symlink_to(name)
    with pytest.raises(AdapterUnreadable, match=f"{name} cannot be read"):
        registry.load(REF)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_flipped_bit_is_unreadable(url: str, registry: AdapterRegistry, name: str) -> None:
    write(registry)
    content = bytearray(read(url, registry, name))
    content[len(content) // 2] ^= 1
    change(url, registry, name, bytes(content))
    with pytest.raises(AdapterUnreadable):
        registry.load(REF)


def test_weights_swapped_together_with_their_checksum_are_unreadable(url: str, registry: AdapterRegistry) -> None:
    write(registry)
    other = replace(REF, version=4)
    write(registry, other, tensors(1))
    fs, _ = fsspec.core.url_to_fs(url)
    foreign = {name: fs.cat_file(f"{registry.path(other)}/{name}") for name in (WEIGHTS, MANIFEST)}
    manifest = json.loads(foreign[MANIFEST])
    manifest["version"] = REF.version
    change(url, registry, WEIGHTS, foreign[WEIGHTS])
    change(url, registry, MANIFEST, json.dumps(manifest, sort_keys=True, indent=1).encode())
    with pytest.raises(AdapterUnreadable, match="seal"):
        registry.load(REF)


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        (replace(REF, version=4), "version"),
        (replace(REF, epoch=2), "epoch"),
        (replace(REF, user_id=UserId("u")), "user"),
    ],
)
def test_another_versions_files_are_unreadable(
    url: str, registry: AdapterRegistry, other: AdapterRef, cause: str
) -> None:
    write(registry)
    fs, _ = fsspec.core.url_to_fs(url)
    fs.makedirs(registry.path(other))
    for name in (CONFIG, WEIGHTS, MANIFEST):
        fs.pipe_file(f"{registry.path(other)}/{name}", read(url, registry, name))
    with pytest.raises(AdapterUnreadable, match=f"another {cause}"):
        registry.load(other)


def test_another_bases_files_are_unreadable(url: str, registry: AdapterRegistry) -> None:
    write(registry)
    elsewhere = AdapterRegistry(url, base=BaseId("base-2"), user_hash=HASH)
    with pytest.raises(AdapterUnreadable, match="missing"):
        elsewhere.load(REF)
    fs, _ = fsspec.core.url_to_fs(url)
    fs.makedirs(elsewhere.path(REF))
    for name in (CONFIG, WEIGHTS, MANIFEST):
        fs.pipe_file(f"{elsewhere.path(REF)}/{name}", read(url, registry, name))
    with pytest.raises(AdapterUnreadable, match="another base"):
        elsewhere.load(REF)


def test_another_deployments_files_are_unreadable(url: str, registry: AdapterRegistry) -> None:
    write(registry)
    stranger = AdapterRegistry(url, base=BASE, user_hash=UserHash("another key"))
    fs, _ = fsspec.core.url_to_fs(url)
    fs.makedirs(stranger.path(REF))
    for name in (CONFIG, WEIGHTS, MANIFEST):
        fs.pipe_file(f"{stranger.path(REF)}/{name}", read(url, registry, name))
    with pytest.raises(AdapterUnreadable, match="another deployment key"):
        stranger.load(REF)


def test_a_base_with_odd_characters_gets_a_plain_folder(url: str) -> None:
    odd = opened(url, base=BaseId("../a b/c"))
    write(odd)
    assert ".." not in odd.path(REF)
    assert_same(odd.load(REF), tensors())


def test_versions_are_those_with_a_manifest(url: str, registry: AdapterRegistry) -> None:
    assert registry.versions(USER, 1) == []
    for version in (3, 10, 2):
        write(registry, replace(REF, version=version))
    write(registry, replace(REF, epoch=2, version=7))
    change(url, registry, MANIFEST, None)
    assert registry.versions(USER, 1) == [2, 10]
    assert registry.versions(USER, 2) == [7]


def test_delete_removes_one_version(registry: AdapterRegistry) -> None:
    write(registry)
    write(registry, replace(REF, version=4))
    registry.delete(REF)
    registry.delete(REF)
    assert registry.versions(USER, 1) == [4]
    with pytest.raises(AdapterUnreadable, match="missing"):
        registry.load(REF)


def test_collection_spares_what_is_kept_and_what_is_young(registry: AdapterRegistry, clock: ManualClock) -> None:
    for version in (1, 2, 3):
        write(registry, replace(REF, version=version))
    clock.advance(100)
    write(registry, replace(REF, version=4))
    older_than = clock.now() - timedelta(seconds=50)
    assert registry.collect(USER, 1, {2}, older_than=older_than) == [1, 3]
    assert registry.versions(USER, 1) == [2, 4]
    assert_same(registry.load(replace(REF, version=2)), tensors())


@pytest.mark.parametrize("depth", [600, 988, 4000])
def test_a_manifest_that_cannot_be_written_again_is_unreadable(url: str, registry: AdapterRegistry, depth: int) -> None:
    write(registry)
    for content in (b'{"seal": "\\ud800"}', b'{"seal": "0", "a": ' + b'{"a": ' * depth + b"1" + b"}" * depth + b"}"):
        change(url, registry, MANIFEST, content)
        with pytest.raises(AdapterUnreadable):
            registry.load(REF)


@pytest.mark.parametrize(
    "written_at", ['"2024-01-01T00:00:00"', "7", "[" * 3000 + "]" * 3000], ids=["naive", "7", "deep"]
)
def test_collection_takes_a_manifest_without_a_time_for_torn(
    url: str, registry: AdapterRegistry, written_at: str
) -> None:
    write(registry)
    change(url, registry, MANIFEST, f'{{"written_at": {written_at}}}'.encode())
    long_ago, soon = datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1)
    assert registry.collect(USER, 1, set(), older_than=long_ago) == []
    assert registry.collect(USER, 1, set(), older_than=soon) == [3]


def test_collection_removes_torn_leftovers_by_their_age(url: str, registry: AdapterRegistry) -> None:
    write(registry)
    change(url, registry, MANIFEST, None)
    long_ago, soon = datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1)
    assert registry.collect(USER, 1, set(), older_than=long_ago) == []
    assert registry.collect(USER, 1, set(), older_than=soon) == [3]


def test_collection_removes_earlier_epochs_and_leaves_other_users(registry: AdapterRegistry) -> None:
    neighbour = replace(REF, user_id=UserId("neighbour"))
    for ref in (REF, replace(REF, epoch=2), replace(REF, epoch=3), neighbour):
        write(registry, ref)
    registry.collect(USER, 2, {3}, older_than=datetime(2000, 1, 1, tzinfo=UTC))
    assert [registry.versions(USER, epoch) for epoch in (1, 2, 3)] == [[], [3], [3]]
    assert_same(registry.load(neighbour), tensors())


def test_erasure_takes_all_epochs_on_all_bases(url: str, registry: AdapterRegistry) -> None:
    elsewhere = AdapterRegistry(url, base=BaseId("base-2"), user_hash=HASH, adapter_config=SETUP)
    neighbour = replace(REF, user_id=UserId("neighbour"))
    for where, ref in ((registry, REF), (registry, replace(REF, epoch=2)), (elsewhere, REF), (registry, neighbour)):
        write(where, ref)
    registry.delete_user(USER)
    registry.delete_user(USER)
    fs, root = fsspec.core.url_to_fs(url)
    assert not [path for path in fs.find(root) if HASH(USER) in path]
    assert_same(registry.load(neighbour), tensors())


def test_erasure_of_an_empty_registry_does_nothing(registry: AdapterRegistry) -> None:
    registry.delete_user(USER)
    assert registry.collect(USER, 1, set(), older_than=datetime.now(UTC)) == []


def test_export_copies_the_checked_files(url: str, registry: AdapterRegistry, tmp_path: Path) -> None:
    write(registry)
    folder = tmp_path / "out" / "here"
    assert {path.name for path in registry.export(REF, folder)} == {CONFIG, WEIGHTS, MANIFEST}
    assert json.loads((folder / CONFIG).read_text()) == SETUP
    with pytest.raises(ConfigError, match="empty"):
        registry.export(REF, folder)
    change(url, registry, WEIGHTS, b"")
    with pytest.raises(AdapterUnreadable):
        registry.export(REF, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_write_that_stops_half_way_is_noticed_and_never_loadable(brittle: AdapterRegistry, name: str) -> None:
    BrittleFileSystem.torn = name
    with pytest.raises(TransientError, match="read back"):
        write(brittle)
    BrittleFileSystem.torn = None
    with pytest.raises(AdapterUnreadable):
        brittle.load(REF)
    write(brittle, replace(REF, version=4))
    assert_same(brittle.load(replace(REF, version=4)), tensors())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_full_disk_is_transient_and_leaves_nothing_loadable(brittle: AdapterRegistry, name: str) -> None:
    BrittleFileSystem.full = name
    with pytest.raises(TransientError, match="No space left"):
        write(brittle)
    BrittleFileSystem.full = None
    with pytest.raises(AdapterUnreadable):
        brittle.load(REF)
    assert brittle.versions(USER, 1) == []


def test_the_brittle_file_system_has_no_moves() -> None:
    with pytest.raises(NotImplementedError):
        fsspec.filesystem("brittle").mv("a", "b")


def test_a_folder_that_cannot_be_made_is_transient(tmp_path: Path) -> None:
    (tmp_path / BASE).write_text("in the way")
    blocked = opened(str(tmp_path))
    with pytest.raises(TransientError, match="cannot write"):
        write(blocked)


@pytest.mark.parametrize("bad", ["nosuchthing://x", "nosuch+thing://x"])
def test_an_unknown_url_is_a_configuration_error(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.url"):
        AdapterRegistry(bad, base=BASE, user_hash=HASH)


def test_weights_of_another_type_are_unreadable(url: str, registry: AdapterRegistry) -> None:
    write(registry)
    content = save({"x": np.zeros(3, dtype=np.float16)})
    reseal(url, registry, content)
    with pytest.raises(AdapterUnreadable, match="float16"):
        registry.load(REF)
    reseal(url, registry, save({"x": np.array([np.nan], dtype=np.float32)}))
    with pytest.raises(AdapterUnreadable, match="finite"):
        registry.load(REF)
    reseal(url, registry, b"not safetensors")
    with pytest.raises(AdapterUnreadable, match="no safetensors"):
        registry.load(REF)


def reseal(url: str, registry: AdapterRegistry, content: bytes, name: str = WEIGHTS) -> None:
    """Write a file and a manifest that vouches for it, as only a holder of the key can."""
    manifest = json.loads(read(url, registry, MANIFEST))
    manifest.pop("seal")
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    plain = json.dumps(manifest, sort_keys=True, indent=1).encode()
    change(url, registry, name, content)
    change(url, registry, MANIFEST, json.dumps(manifest | {"seal": HASH.seal(plain)}).encode())


def test_peft_loads_what_was_exported(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    class Small(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.query = torch.nn.Linear(6, 4)

        def forward(self, x: Any) -> Any:
            return self.query(x)

    torch.manual_seed(0)
    base, inputs = Small(), torch.randn(3, 6)
    plain = base(inputs).detach()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query"])
    trained = get_peft_model(Small(), config)
    weights = {n: torch.randn_like(t).numpy() for n, t in get_peft_model_state_dict(trained).items()}
    content = {**config.to_dict(), "peft_type": "LORA", "task_type": None}
    registry = opened(str(tmp_path / "r"), setup=content)
    write(registry, weights=weights)
    registry.export(REF, tmp_path / "out")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    found = {n: t.numpy() for n, t in get_peft_model_state_dict(loaded).items()}
    assert_same(found, weights)
    later = AdapterRegistry(
        str(tmp_path / "r"), base=BASE, user_hash=HASH, adapter_config={**content, "lora_alpha": 10.0, "r": 8}
    )
    [a, b] = [value for _, value in sorted(later.load(REF).items())]
    delta = (10.0 / 2) * inputs.numpy() @ a.T @ b.T
    np.testing.assert_allclose(plain.numpy() + delta, loaded(inputs).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [8, 1.0, 3])
def test_a_changed_alpha_of_the_model_rescales_no_version(url: str, registry: AdapterRegistry, alpha: float) -> None:
    write(registry)
    changed = AdapterRegistry(url, base=BASE, user_hash=HASH, adapter_config={**SETUP, "lora_alpha": alpha})
    found = changed.load(REF)
    for name, value in tensors().items():
        assert found[name].dtype == np.float32
        expected = value * np.float32(4 / alpha) if "lora_B" in name else value
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert_same(AdapterRegistry(url, base=BASE, user_hash=HASH).load(REF), tensors())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", None),
        ("lora_alpha", "4"),
        ("lora_alpha", 0),
        ("lora_alpha", True),
        ("r", None),
        ("r", 3),
        ("r", 2.5),
        ("use_rslora", True),
        ("use_dora", True),
        ("rank_pattern", {"q": 4}),
        ("alpha_pattern", {"q": 4}),
    ],
)
def test_a_configuration_that_contradicts_its_weights_is_unreadable(tmp_path: Path, field: str, value: object) -> None:
    registry = opened(str(tmp_path))
    write(registry)
    setup = {name: known for name, known in {**SETUP, field: value}.items() if known is not None}
    reseal(str(tmp_path), registry, json.dumps(setup).encode(), CONFIG)
    with pytest.raises(AdapterUnreadable, match=rf"version 3 .*{CONFIG}: {field}: "):
        registry.load(REF)


@pytest.mark.parametrize("content", [b"", b"[]", b"{"])
def test_a_configuration_that_is_no_json_object_is_unreadable(tmp_path: Path, content: bytes) -> None:
    registry = opened(str(tmp_path))
    write(registry)
    reseal(str(tmp_path), registry, content, CONFIG)
    with pytest.raises(AdapterUnreadable, match=f"{CONFIG}: .* JSON"):
        registry.load(REF)


def test_a_base_without_a_usable_alpha_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_alpha"):
        AdapterRegistry(str(tmp_path), base=BASE, user_hash=HASH, adapter_config={**SETUP, "lora_alpha": 0})
