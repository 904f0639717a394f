"""A folder of exports in a bucket: what is served, and what takes over, though its files come one by one."""

from embedshard.export.manifest import MANIFEST, open_export
from embedshard.serve.engine import Recommend
from embedshard.serve.live import LiveExport, candidates
from embedshard.storage import locate


def upload(export, target, names=None):
    """Puts an export's files into a folder of a bucket, the manifest last; returns their names."""
    files = sorted(path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file())
    wanted = [name for name in files if name != MANIFEST] + [MANIFEST] if names is None else names
    for name in wanted:
        place = locate(target).join(*name.split("/"))
        place.parent.make_dirs()
        place.put_file(export / name)
    return wanted


def test_a_newer_export_in_a_bucket_takes_over_when_all_of_it_is_there(two_exports, bucket):
    older, newer = two_exports
    steps = [open_export(out).manifest.step for out in two_exports]
    upload(older, f"{bucket}/exports/a")
    live = LiveExport(f"{bucket}/exports")
    assert live.served.engine.step == steps[0]
    assert not live.look()
    upload(newer, f"{bucket}/exports/b", [MANIFEST, "items.parquet"])  # as a tool does that copies in any order
    assert not live.look()
    assert "users.parquet is missing" in live.refusal.why
    assert live.served.engine.step == steps[0]
    upload(newer, f"{bucket}/exports/b")
    assert live.look(at_once=True)
    assert live.served.engine.step == steps[1]
    assert live.refusal is None
    [answer] = live.served.engine.answer([Recommend(7, 5)])
    assert len(answer.ids) == 5
    locate(f"{bucket}/exports/CURRENT").write_text_atomically("a\n")
    assert [one.folder.name for one in candidates(f"{bucket}/exports")] == ["a"]
    assert live.look()
    assert live.served.engine.step == steps[0]
