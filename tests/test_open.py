"""Decoder.open, and processes that decode: before there is a batch, and nothing else changes."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import is_running
from test_decode import encode, photo
from test_decoder import BMP, JPEG, PNG, assert_same

import nbvision as nbv
from nbvision.codecs import _processes, host
from nbvision.codecs._processes import DONE, FAILED, HAS_LEFT, JOB, RUNNING, STATE, WORKER, Processes
from nbvision.errors import DeviceError, InputError
from nbvision.serve.config import PipelineConfig
from nbvision.serve.served import Limits, Served
from nbvision.serve.service import _made

PROGRESSIVE = encode(photo(), "JPEG", progressive=True)
FILES = [JPEG, PNG, b"broken", PROGRESSIVE, PNG[:3000], BMP, b""]
SHARED = 1 << 24


@pytest.fixture(scope="module")
def shared() -> Processes:
    """Two processes, for as long as this file runs; every decoder that asks for as many has them."""
    found = _processes.processes(2, SHARED)
    found.wait_until_ready()
    return found


def decoder_of(device: Any, **options: Any) -> nbv.Decoder:
    return nbv.Decoder(device=device, processes=2, shared_bytes=SHARED, **options)


def wait_until(is_so: Callable[[], Any]) -> None:
    ends_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.001)


def ids_of(processes: Processes) -> list[int]:
    return [worker.process.pid for worker in processes._workers]


@contextmanager
def stopped(processes: Processes) -> Iterator[None]:
    """Within this context the processes do nothing."""
    held = ids_of(processes)
    for process_id in held:
        os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        for process_id in held:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGCONT)


def free_bytes(processes: Processes) -> int:
    with processes._changing:
        processes._reclaimed_s = 0.0
        processes._reclaim()
        return processes.places.free_bytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"color": "bgra"},
        {"color": "gray"},
        {"recover": True},
        {"background": [9, 8, 7]},
        {"reduce": 2},
        {"strict": True},
    ],
    ids=str,
)
def test_opened_images_are_decoded_as_their_files_are(device: Any, options: Any, shared: Processes) -> None:
    expected = nbv.decode(FILES, device=device, **options)
    with decoder_of(device, **options) as decoder:
        opened = [decoder.open(data) for data in FILES]
        for sources in (opened, opened, [opened[0], *FILES[1:3], *opened[3:]]):
            for batch in (
                decoder(sources),
                decoder.submit(sources).result(),
                nbv.decode(sources, device=device, **options),
            ):
                assert_same(batch, expected)
                assert [str(damage) for damage in batch.damage] == [str(damage) for damage in expected.damage]
                rows = [[error and error.valid_rows for error in each.damage] for each in (batch, expected)]
                assert rows[0] == rows[1]


def test_batches_of_one_opened_image_have_a_damage_each(device: Any) -> None:
    with nbv.Decoder(device=device, recover=True) as decoder:
        opened = decoder.open(PNG[:3000])
        damages = [decoder([opened]).damage[0] for _ in range(2)]
    for damage in damages:
        assert damage is not None
        assert damage.kind == "truncated"
        assert damage.valid_rows is not None
    assert damages[0] is not damages[1]


def test_what_the_host_decodes_is_decoded_before_the_batch(
    device: Any, shared: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = nbv.decode([PNG, PROGRESSIVE, JPEG], device=device)
    with decoder_of(device) as decoder:
        opened = [decoder.open(data) for data in (PNG, PROGRESSIVE, JPEG)]
        for image in opened[: 3 if device == "cpu" else 2]:
            wait_until(lambda image=image: image.is_decoded)

        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError("it was decoded already")

        monkeypatch.setattr(host, "decode_into", refuse)
        assert_same(decoder(opened), expected)


def test_a_decoder_without_processes_opens_as_well(device: Any) -> None:
    with nbv.Decoder(device=device) as decoder:
        opened = [decoder.open(data) for data in FILES]
        assert_same(decoder(opened), nbv.decode(FILES, device=device))
        assert not any(image.is_decoded for image in opened)


def test_headers_are_read_at_once(device: Any, shared: Processes, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(PNG[:3000])
    with decoder_of(device, limit_pixels=97 * 1000) as decoder:
        whole, cut, missing, none = map(decoder.open, (PNG, path, tmp_path / "missing", b"no image"))
        assert (whole.header and whole.header.format, whole.error, whole.nbytes) == ("png", None, len(PNG))
        assert "png" in repr(whole)
        kinds = [image.error and image.error.kind for image in (cut, missing, none)]
        assert kinds == ["truncated", "unreadable", "not_an_image"]
        assert cut.error is not None
        assert cut.error.source == str(path)
        assert "ends before" in repr(cut)
        assert decoder.open(whole) is whole
        big = decoder.open(nbv.encode(np.zeros((1000, 98, 3), np.uint8), "png"))
        assert big.error is not None
        assert big.error.kind == "too_large"


def test_errors_that_processes_find_know_their_file(device: Any, shared: Processes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    path.write_bytes(PNG[:600] + b"damage" + PNG[606:])
    with decoder_of(device) as decoder:
        (error,) = decoder(decoder.open(path)).errors
        (expected,) = nbv.decode(path, device=device).errors
        assert error is not None
        assert expected is not None
        assert (str(error), error.kind, error.source) == (str(expected), expected.kind, str(path))


def test_an_image_that_nobody_waits_for_is_not_decoded(device: Any, shared: Processes) -> None:
    with decoder_of(device) as decoder:
        with stopped(shared):
            opened = [decoder.open(BMP), decoder.open(PNG)]
            place = opened[0]._image.job._place
            del opened[0]
            gc.collect()
        wait_until(lambda: opened[0].is_decoded)
        wait_until(lambda: shared.shared.number(place, STATE) == FAILED)
    opened.clear()
    gc.collect()
    wait_until(lambda: free_bytes(shared) == SHARED)


def test_what_finds_no_room_is_decoded_by_threads(device: Any, shared: Processes) -> None:
    size = (701, 903)
    pictures = [nbv.encode(np.full((*size, 3), level, np.uint8), "png") for level in range(0, 240, 10)]
    assert len(pictures) * size[0] * size[1] * 3 > 2 * SHARED
    huge = nbv.encode(np.zeros((1300, 1400, 3), np.uint8), "png")  # more than a quarter by itself
    with decoder_of(device) as decoder:
        opened = [decoder.open(data) for data in (*pictures, huge)]
        began = [image._image.job is not None for image in opened]
        assert 3 < sum(began) < len(pictures)
        assert not began[-1]
        batch = decoder(opened)
        assert batch.sizes[-1].tolist() == [1300, 1400]
        for level, pixels in zip(range(0, 240, 10), batch.to("cpu"), strict=False):
            assert (pixels == level).all()
        del opened
        gc.collect()
        wait_until(lambda: free_bytes(shared) == SHARED)


def test_who_waits_for_an_image_is_told_when_it_is_decoded(device: Any, shared: Processes) -> None:
    with decoder_of(device) as decoder:
        images = [decoder.open(data) for data in [*FILES, b"no image"] * 20]
        told: list[tuple[Any, bool]] = []
        for image in images:
            image.add_done_callback(lambda image: told.append((image, image.is_decoded)))
            image.add_done_callback(lambda image: told.append((image, image.is_decoded)))
        wait_until(lambda: len(told) == 2 * len(images))
        assert all(is_so for image, is_so in told if image.error is None and image._image.job is not None)
        assert {id(image) for image, _ in told} == set(map(id, images))
        at_once: list[Any] = []
        for image in images:  # nothing is left to wait for
            image.add_done_callback(at_once.append)
        assert at_once == images


def test_a_callback_that_fails_keeps_nobody_from_hearing(
    device: Any, lonely: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(image: Any) -> None:
        raise ValueError("on purpose")

    told: list[Any] = []
    decoder, first = opened_by(lonely, PNG, device)
    with stopped(lonely):
        images = [first, decoder.open(BMP)]
        for image in images:
            image.add_done_callback(fail)
            image.add_done_callback(told.append)
        assert not told
    wait_until(lambda: len(told) == 2)
    assert capfd.readouterr().err.count("ValueError: on purpose") == 2


def test_who_waits_for_a_process_that_is_stopped_or_ends_is_told_soon(device: Any, lonely: Processes) -> None:
    """The batch waits then, and finds out what is wrong."""
    told: list[float] = []
    with one_that_waits(lonely, device) as (decoder, _, image):
        began_s = time.monotonic()
        image.add_done_callback(lambda _: told.append(time.monotonic() - began_s))
        wait_until(lambda: told)
        assert 0.4 < told[0] < 5
        assert not image.is_decoded
        other = decoder.open(PNG)
        other.add_done_callback(lambda _: told.append(0.0))
        os.kill(ids_of(lonely)[0], signal.SIGKILL)
        wait_until(lambda: len(told) == 2)
    assert_same(decoder([image, other]), nbv.decode([BMP, PNG], device=device))


def test_who_waits_with_others_is_told_whoever_is_told_first(device: Any, lonely: Processes) -> None:
    """One whose image is decoded while another comes must not leave that one unheard of."""
    told: list[Any] = []
    with one_that_waits(lonely, device) as (_, first, second):
        lonely.done.tell(first._image.job._place, first._image.job, lambda: told.append(first))
        second.add_done_callback(told.append)
        wait_until(lambda: len(told) == 2)
    assert told == [first, second]


def test_a_place_that_another_image_has_by_now_tells_nobody(device: Any, lonely: Processes) -> None:
    told: list[Any] = []
    with one_that_waits(lonely, device) as (_, _, other):
        began_s = time.monotonic()
        other.add_done_callback(lambda _: told.append(time.monotonic() - began_s))
        lonely.done._say(other._image.job._place)
        wait_until(lambda: told)
    assert told[0] > 0.4


def test_where_there_can_be_no_thread_nobody_waits(
    device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    told: list[Any] = []
    with one_that_waits(lonely, device) as (_, _, image):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            image.add_done_callback(told.append)
        assert told == [image]
        image.add_done_callback(told.append)
        assert len(told) == 1
    wait_until(lambda: len(told) == 2)


def test_the_thread_that_tells_ends_with_the_processes(device: Any) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "nbvision-decoded"]

    before, files = len(threads()), len(os.listdir("/proc/self/fd"))
    found = Processes(1, 1 << 26)
    found.wait_until_ready()
    decoder, image = opened_by(found, PNG, device)
    told: list[Any] = []
    image.add_done_callback(told.append)
    wait_until(lambda: told)
    assert len(threads()) == before + 1
    del found, decoder, image
    told.clear()
    gc.collect()
    wait_until(lambda: len(threads()) == before)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == files)


def test_images_in_a_cycle_give_their_memory_back(device: Any, shared: Processes) -> None:
    """What is collected along with a job, such as an event of CUDA, is gone before the job is."""
    with decoder_of(device) as decoder:
        for _ in range(3):
            cycle: list[Any] = [decoder.open(PNG), decoder.open(BMP)]
            assert decoder(cycle[:2]).ok.all()
            assert decoder.submit(cycle[:2]).result().ok.all()
            cycle.append(cycle)
            del cycle
            gc.collect()
    wait_until(lambda: free_bytes(shared) == SHARED)


def test_many_threads_decode_the_same_opened_images(device: Any, shared: Processes) -> None:
    expected = nbv.decode(FILES, device=device)
    with decoder_of(device, workers=4) as decoder, ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            opened = [decoder.open(data) for data in FILES]
            for future in [threads.submit(decoder, opened) for _ in range(8)]:
                assert_same(future.result(), expected)


def test_pixels_are_not_overwritten_before_they_are_copied(device: Any, shared: Processes) -> None:
    """The same memory over and over, faster than anybody looks at the batches."""
    levels = range(0, 250, 10)
    pictures = [nbv.encode(np.full((301, 403, 3), level, np.uint8), "png") for level in levels]
    with decoder_of(device) as decoder:
        batches = [decoder(pictures) for _ in range(12)]
        for batch in batches:
            for level, pixels in zip(levels, batch.to("cpu"), strict=True):
                assert (pixels == level).all()


def test_a_batch_has_its_own_limit_and_options(device: Any, shared: Processes) -> None:
    with decoder_of(device) as decoder:
        image = decoder.open(PNG)
        (error,) = nbv.decode(image, device=device, limit_pixels=10).errors
        assert error is not None
        assert error.kind == "too_large"
        assert decoder(image).ok.all()
        for options in ({"color": "gray"}, {"recover": True}, {"reduce": 2}, {"background": (1, 2, 3)}):
            with pytest.raises(InputError, match="was opened for"):
                nbv.decode([PNG, image], device=device, **options)
        with pytest.raises(InputError, match="first frame"):
            nbv.decode_frames(image, device=device)


def test_what_is_no_source_is_refused_at_once(device: Any) -> None:
    decoder = nbv.Decoder(device=device)
    for source in (3, None, [PNG, PNG], []):
        with pytest.raises(InputError):
            decoder.open(source)
    for options in ({"processes": -1}, {"processes": 1.5}, {"shared_bytes": 0}, {"shared_bytes": None}):
        with pytest.raises(InputError, match=next(iter(options))):
            nbv.Decoder(device=device, **options)


# --- processes that end -----------------------------------------------------------------------------------------------


@pytest.fixture
def lonely() -> Processes:
    """One process."""
    found = Processes(1, 1 << 26)
    found.wait_until_ready()
    return found


def opened_by(processes: Processes, data: bytes, device: Any) -> tuple[nbv.Decoder, Any]:
    decoder = nbv.Decoder(device=device)
    decoder._processes = processes
    return decoder, decoder.open(data)


@contextmanager
def one_that_waits(processes: Processes, device: Any) -> Iterator[tuple[nbv.Decoder, Any, Any]]:
    """A decoder, an image that is decoded, and one that is not, for meanwhile the process is stopped."""
    decoder, first = opened_by(processes, PNG, device)
    wait_until(lambda: first.is_decoded)
    with stopped(processes):
        yield decoder, first, decoder.open(BMP)


def dies_of(processes: Processes, data: bytes, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process that takes this file end, as if by it, so many times."""
    queue, shared, deaths = processes.queue, processes.shared, iter(range(times))

    def queue_or_kill(place: int) -> bool:
        if shared.file(place) != data or next(deaths, None) is None:
            return queue(place)
        (process_id,) = ids_of(processes)
        shared.say(place, WORKER, process_id)
        shared.say(place, STATE, RUNNING)
        os.kill(process_id, signal.SIGKILL)
        return True

    monkeypatch.setattr(processes, "queue", queue_or_kill)


def test_another_process_decodes_what_one_has_died_of(
    device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ids_of(lonely)
    dies_of(lonely, BMP, 1, monkeypatch)
    decoder, image = opened_by(lonely, BMP, device)
    assert_same(decoder(image), nbv.decode(BMP, device=device))
    assert ids_of(lonely) != before
    lonely.wait_until_ready()
    assert_same(decoder([BMP, PNG]), nbv.decode([BMP, PNG], device=device))


def test_what_kills_two_processes_is_an_error_and_nothing_else_is(
    device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_of(lonely, BMP, 2, monkeypatch)
    decoder, image = opened_by(lonely, BMP, device)
    other = decoder.open(PNG)
    batch = decoder([other, image])
    assert_same(batch.select([0]), nbv.decode(PNG, device=device))
    assert batch.errors[1] is not None
    assert batch.errors[1].kind == "failed"
    assert "two processes ended" in str(batch.errors[1])


@pytest.mark.parametrize("said", ["who has it", "that it is done"])
def test_a_process_may_end_between_any_two_words(
    device: Any, lonely: Processes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, shared = lonely.queue, lonely.shared

    def kill(place: int) -> bool:
        (process_id,) = ids_of(lonely)
        os.kill(process_id, signal.SIGKILL)
        shared.say(place, WORKER, process_id)
        if said == "that it is done":
            shared.pixels(place)[:] = 7
            shared.write_text(place, "{}")
            shared.say(place, STATE, DONE)
        monkeypatch.setattr(lonely, "queue", queue)
        return True

    monkeypatch.setattr(lonely, "queue", kill)
    decoder, image = opened_by(lonely, BMP, device)
    pixels = decoder(image).to("cpu")[0]
    if said == "that it is done":
        assert (pixels == 7).all()
    else:
        np.testing.assert_array_equal(pixels, nbv.decode(BMP, device="cpu")[0])
    size_bytes = lonely.shared.size_bytes
    del image
    gc.collect()
    lonely.has_any()
    wait_until(lambda: free_bytes(lonely) == size_bytes)


def test_a_block_is_not_given_out_before_its_process_has_left_it(device: Any, lonely: Processes) -> None:
    decoder, image = opened_by(lonely, BMP, device)
    place, size_bytes = image._image.job._place, lonely.shared.size_bytes
    wait_until(lambda: lonely.shared.number(place, HAS_LEFT))
    lonely.shared.say(place, HAS_LEFT, 0)  # as if it had just said that it is done
    del image
    gc.collect()
    assert free_bytes(lonely) < size_bytes
    lonely.shared.say(place, HAS_LEFT, 1)
    assert free_bytes(lonely) == size_bytes
    assert decoder(PNG).ok.all()


def test_a_pipe_that_is_full_leaves_the_rest_to_threads(device: Any, lonely: Processes) -> None:
    files = [nbv.encode(np.full((3, 2, 3), level, np.uint8), "png") for level in range(200)] * 5
    fcntl.fcntl(lonely._jobs, fcntl.F_SETPIPE_SZ, 4096)
    with stopped(lonely):
        decoder, _ = opened_by(lonely, PNG, device)
        opened = [decoder.open(data) for data in files]
    began = [image._image.job is not None for image in opened]
    assert 200 < sum(began) <= 4096 // 16
    for index, pixels in enumerate(decoder(opened).to("cpu")):
        assert (pixels == index % 200).all()


def test_a_process_that_cannot_be_started_is_no_error(
    device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise BlockingIOError("no more processes")

    decoder, image = opened_by(lonely, PNG, device)
    wait_until(lambda: image.is_decoded)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(_processes, "_REPLACE_S", 0.0)
    for process_id in ids_of(lonely):
        os.kill(process_id, signal.SIGKILL)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert_same(decoder([image, BMP]), nbv.decode([PNG, BMP], device=device))
    assert len(os.listdir("/proc/self/fd")) <= before


def run_script(code: str, **options: Any) -> str:
    path = options.pop("path")
    path.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)], capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_forks_leave_the_processes_alone(tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    png.write_bytes(PNG)
    code = f"""
        import gc, os
        import numpy as np, nbvision as nbv
        decoder = nbv.Decoder(device="cpu", processes=2, shared_bytes=1 << 22)
        decoder.warm_up()
        expected = nbv.decode({str(png)!r}, device="cpu", threads=1)[0]
        opened = [decoder.open({str(png)!r}) for _ in range(20)]
        child = os.fork()
        if not child:
            alone = nbv.decode(opened[:10], device="cpu", threads=1)
            assert all((pixels == expected).all() for pixels in alone)
            assert not any(image.is_decoded for image in opened)
            opened.clear()
            gc.collect()
            decoder.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert all((pixels == expected).all() for pixels in decoder(opened))
        assert all(image.is_decoded for image in opened)
    """
    run_script(code, path=tmp_path / "forks.py")


def test_what_is_decoded_at_exit_is_decoded_by_threads(tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    png.write_bytes(PNG)
    code = f"""
        import atexit
        @atexit.register
        def late():
            _processes._REPLACE_S = 0.0
            print(decoder({str(png)!r}).ok.all(), decoder.open({str(png)!r}).is_decoded)
        import nbvision as nbv
        from nbvision.codecs import _processes
        decoder = nbv.Decoder(device="cpu", processes=1, shared_bytes=1 << 22, threads=1)
        decoder.warm_up()
    """
    assert run_script(code, path=tmp_path / "late.py").split() == ["True", "False"]


def test_processes_import_nothing_from_where_they_happen_to_be(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "simplejpeg.py").write_text("raise SystemExit('from the current directory')")
    code = """
        import nbvision as nbv
        decoder = nbv.Decoder(device="cpu", processes=1, shared_bytes=1 << 22)
        decoder.warm_up()
        print(decoder._processes.has_any())
    """
    assert run_script(code, path=tmp_path / "there.py", cwd=tmp_path / "here").split() == ["True"]


def test_memory_that_cannot_be_shared_is_refused(device: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DeviceError, match="use fewer"):
        nbv.Decoder(device=device, processes=1, shared_bytes=1 << 62)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_where_no_process_starts_threads_decode(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    processes = Processes(2, 1 << 22)
    processes.wait_until_ready()
    assert not processes.has_any()
    decoder, image = opened_by(processes, PNG, device)
    assert_same(decoder([image, BMP]), nbv.decode([PNG, BMP], device=device))


def test_who_waits_for_a_process_when_the_last_one_ends_decodes_itself(
    device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processes, "_STARTS", 0)
    (process_id,) = ids_of(lonely)
    with stopped(lonely):
        decoder, image = opened_by(lonely, PNG, device)
        os.kill(process_id, signal.SIGKILL)
        assert_same(decoder(image), nbv.decode(PNG, device=device))
    assert_same(decoder(BMP), nbv.decode(BMP, device=device))


def test_a_job_that_ended_with_who_took_it_is_decoded_all_the_same(
    device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, size_bytes = lonely.queue, lonely.shared.size_bytes
    monkeypatch.setattr(lonely, "queue", lambda place: True)  # taken, and never heard of again
    decoder, image = opened_by(lonely, PNG, device)
    assert_same(decoder(image), nbv.decode(PNG, device=device))
    del image
    gc.collect()
    assert free_bytes(lonely) < size_bytes
    monkeypatch.setattr(_processes, "_LOST_S", 0.0)
    assert free_bytes(lonely) == size_bytes
    # Should it be heard of all the same, then of a block that is another's.
    monkeypatch.setattr(lonely, "queue", queue)
    late = JOB.pack(0, 12345)
    assert os.write(lonely._jobs, late) == len(late)
    assert_same(decoder([BMP, PNG]), nbv.decode([BMP, PNG], device=device))
    wait_until(lonely.has_taken_all)
    assert len(ids_of(lonely)) == 1


def test_idle_processes_that_end_are_replaced(device: Any, lonely: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = ids_of(lonely)
    os.kill(before, signal.SIGKILL)
    monkeypatch.setattr(_processes, "_REPLACE_S", 0.0)
    decoder, _ = opened_by(lonely, PNG, device)
    wait_until(lambda: decoder.open(PNG)._image.job is not None and ids_of(lonely) != [before])
    assert_same(decoder(decoder.open(PNG)), nbv.decode(PNG, device=device))


def test_processes_end_with_their_last_decoder(device: Any) -> None:
    decoder = nbv.Decoder(device=device, processes=1, shared_bytes=1 << 22)
    other = nbv.Decoder(device=device, processes=1, shared_bytes=1 << 22)
    assert decoder._processes is other._processes is not None
    decoder.warm_up()
    assert decoder(PNG).ok.all()
    (process_id,) = ids_of(decoder._processes)
    decoder.close()
    os.kill(process_id, 0)
    assert decoder(PNG).ok.all()  # by threads
    other.close()
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_no_process_outlives_who_started_it(tmp_path: Path) -> None:
    code = (
        "import os, signal, nbvision as nbv\n"
        "decoder = nbv.Decoder(device='cpu', processes=2, shared_bytes=1 << 22)\n"
        "print(*[worker.process.pid for worker in decoder._processes._workers], flush=True)\n"
        "decoder.warm_up()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.split()) == 2
    for process_id in done.stdout.split():
        wait_until(lambda process_id=process_id: not is_running(int(process_id)))


def served(*, in_flight: int | None = None, **options: Any) -> Served:
    return _made(PipelineConfig("shop", "recognizer", {"device": "cpu", **options}, Limits(in_flight=in_flight)))


@pytest.mark.parametrize(("processes", "said", "threads"), [(0, None, 2), (1, None, 1), (1, 3, 3)])
def test_one_batch_is_in_flight_in_a_service_that_decodes_ahead(processes: int, said: Any, threads: int) -> None:
    shop = served(in_flight=said, decode_processes=processes)
    try:
        assert shop.batcher.timeline().threads == threads
    finally:
        shop.close()


def test_who_comes_after_a_service_s_pipeline_has_closed_hears_that() -> None:
    shop = served()
    shop.close()
    with pytest.raises(InputError, match="closed"):
        asyncio.run(shop.answer(JPEG, deadline_ms=None))
