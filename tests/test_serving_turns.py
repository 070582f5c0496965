"""Whose turn it is in the server: who waits, who draws with whom, and what a quality promises."""

import asyncio
import heapq
import json
import random
import statistics
from collections import deque
from pathlib import Path

import pytest

from piflux.serving.grouping import Pace, Rate, Team, choose, expected_end, teams_of
from piflux.serving.qualities import PROMISES, promises_of
from piflux.serving.turns import REMEMBERED
from piflux.serving.waiting import Waiting

# --- who waits ---------------------------------------------------------------------------------


def test_users_take_turns():
    """Whoever asks for much waits for himself alone, and nobody overtakes within a user's."""
    waiting = Waiting(10)
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        waiting.put(item[0], item)
    assert list(waiting) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    taken = [waiting.take(), waiting.take()]
    waiting.put("a", "a4")  # who had his turn is behind the others, also with what comes later
    taken += [waiting.take() for _ in range(len(waiting))]
    assert taken == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert waiting.take() is None


def test_what_lost_its_turn_comes_first_and_what_is_dropped_takes_no_turn():
    waiting = Waiting(10)
    for item in ("a1", "a2", "b1"):
        waiting.put(item[0], item)
    waiting.put_back("again")
    assert list(waiting) == ["again", "a1", "b1", "a2"]
    waiting.drop(lambda item: item == "a1")
    assert [waiting.take() for _ in range(3)] == ["again", "a2", "b1"]


def test_only_what_fits_is_taken_and_the_rest_keeps_its_place():
    waiting = Waiting(3)
    for item in ("a1", "b1", "c2"):
        waiting.put(item[0], item)
    assert not waiting.fits(1)
    assert waiting.take(lambda item: item.endswith("2")) == "c2"
    assert waiting.fits(1) and not waiting.fits(2)
    assert list(waiting) == ["a1", "b1"]


# --- who draws with whom -----------------------------------------------------------------------


def test_teams_lie_within_each_other():
    assert teams_of(1) == [Team(0, 1)]
    assert {b.size: sum(1 for x in teams_of(4) if x.size == b.size) for b in teams_of(4)} == {
        1: 4,
        2: 2,
        4: 1,
    }
    assert teams_of(3, [3]) == [Team(0, 3)]
    with pytest.raises(ValueError, match="groups of 3 ranks: of 4 ranks choose among 1, 2, 4"):
        teams_of(4, [3])


# Four ranks do an image in a third of one's time, two in 0.55 of it.
SECONDS = {1: 10.0, 2: 5.5, 4: 3.3}


def chosen(waiting, free_at=(0, 0, 0, 0), ranks=4):
    return choose(teams_of(ranks), dict(enumerate(free_at)), SECONDS, waiting, 0.0)


def test_groups_are_as_the_load_asks():
    """One image alone gets all ranks, a long queue one rank each, and pairs lie in between."""
    sizes = [chosen(waiting).size for waiting in range(1, 60)]
    assert sizes[0] == 4
    assert sizes[-1] == 1
    assert 2 in sizes
    assert sizes == sorted(sizes, reverse=True)


def test_a_group_waits_for_a_rank_that_is_soon_free_and_for_no_other():
    assert chosen(1, (0, 1, 0, 0)) is None  # 1 + 3.3 s on all are less than 5.5 on two
    assert chosen(1, (0, 5, 0, 0)) == Team(2, 2)
    assert chosen(1, (5, 0, 6, 6)) == Team(1, 1) or chosen(1, (5, 0, 6, 6)) is None
    assert chosen(8, (9, 9, 9, 0)) == Team(3, 1)
    assert chosen(1, (9, 9, 9, 9)) is None


def simulated(ranks, groups, seconds, load, *, lasts, seed=0):
    """Seconds from asking to each picture, and pictures a second.

    They are asked for at random times. The server is empty at first, and a picture takes some per
    cent more or less than the pace tells.
    """
    dice, noise = random.Random(seed), random.Random(seed + 1)
    count = round(load * ranks / seconds[1] * lasts)
    coming = deque(sorted(dice.uniform(0, lasts) for _ in range(count)))
    teams, waiting, ends, took = teams_of(ranks, groups), deque(), [], []
    drawn = dict.fromkeys(range(ranks), (0.0, 0.0, 0.0))  # began, should take, ends
    pace, rate, now = Pace(), Rate(), 0.0
    for size in groups:
        pace.learn(size, 1, 1, seconds[size], None)
    while coming or ends:
        memory_s = REMEMBERED * pace.seconds(min(groups), 1, 1)
        if coming and (not ends or coming[0] < ends[0][0]):
            now = coming.popleft()
            rate.came(1, now, memory_s)
            waiting.append(now)
        else:
            now, size, lately = heapq.heappop(ends)
            pace.learn(size, 1, 1, lately, None)
        while waiting:
            known = {size: pace.seconds(size, 1, 1) for size in groups}
            free_at = {
                rank: now if end <= now else expected_end(began, should, now)
                for rank, (began, should, end) in drawn.items()
            }
            asked = rate.a_second(now, memory_s)
            team = choose(teams, free_at, known, len(waiting), now, asked)
            if team is None:
                break
            lately = seconds[team.size] * noise.gauss(1, 0.02)
            drawn |= dict.fromkeys(team.ranks, (now, known[team.size], now + lately))
            heapq.heappush(ends, (now + lately, team.size, lately))
            took.append(now + lately - waiting.popleft())
    return took, count / now


H200 = {1: 1.17, 2: 0.77}
"""Of two, by `benchmarks/results/2026-11-30-serving-load-two-h200.json`."""


@pytest.mark.parametrize("load", [0.25, 0.6, 0.8, 0.9, 1.1])
@pytest.mark.parametrize(
    "seconds", [{1: 1.0, 2: 0.7}, H200, {1: 1.0, 2: 0.55}, {1: 1.0, 2: 0.51}, SECONDS]
)
def test_groups_as_the_load_asks_are_as_good_as_the_best_fixed_ones(seconds, load):
    """At every load, above what can be borne too, whether or not a pair is nearly twice as fast."""
    ranks, lasts = max(seconds), 600 * seconds[1]
    fixed = [simulated(ranks, [size], seconds, load, lasts=lasts) for size in seconds]
    took, a_second = simulated(ranks, list(seconds), seconds, load, lasts=lasts)
    assert statistics.mean(took) < 1.03 * min(statistics.mean(waits) for waits, _ in fixed)
    assert a_second > 0.98 * max(rate for _, rate in fixed)


def beside_fixed(of, load, lasts):
    """Of 30 rows of the benchmark, times of groups as the load asks by those of the best fixed."""
    for seed in range(30):
        *fixed, asked = (
            of(simulated(2, groups, H200, load, lasts=lasts, seed=seed)[0])
            for groups in ([1], [2], [1, 2])
        )
        yield asked / min(fixed)


def test_at_high_load_half_of_the_pictures_come_as_soon_as_with_the_best_fixed_groups():
    """In rows of two minutes. One of 16 seconds is chance, which can't tell 5 %."""
    short, long = (list(beside_fixed(statistics.median, 0.9, lasts)) for lasts in (16.0, 120.0))
    assert statistics.mean(long) < 1.04
    assert statistics.stdev(long) < 0.05 < statistics.stdev(short)


def test_what_is_least_is_the_mean_time():
    """At middle load half of the pictures may come later than with fixed groups for it."""
    assert statistics.mean(beside_fixed(statistics.mean, 0.6, 120.0)) < 0.97
    assert statistics.mean(beside_fixed(statistics.median, 0.6, 120.0)) < 1.1


def test_a_row_of_the_benchmark_has_the_load_that_it_says(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from serving import Answered, _at_random

    class Server:
        async def ask(self, seed):
            return Answered(0.0, seed, 200)

    for seed in range(3):
        asked = _at_random(Server(), 200.0, 0.1, random.Random(seed))
        answers, seconds = asyncio.run(asked)
        assert len(answers) == 20
        assert len({answer.seed for answer in answers}) > 1 and seconds > 0.05


def test_a_group_of_a_size_that_was_never_timed_is_not_formed():
    teams = teams_of(2)
    assert choose(teams, {0: 0, 1: 0}, {1: 3.0}, 1, 0.0) == Team(0, 1)
    assert choose(teams, {0: 0, 1: 0}, {}, 1, 0.0) is None


def test_pace_tells_other_sizes_and_steps_from_those_that_were_drawn():
    pace = Pace()
    assert pace.seconds(2, 100, 10) is None
    pace.learn(2, 100, 10, 12.0, 1.0)  # 2 s beside the steps
    assert pace.seconds(2, 100, 10) == pytest.approx(12)
    assert pace.seconds(2, 200, 5) == pytest.approx(2 * (2 + 5))
    for _ in range(50):
        pace.learn(2, 100, 10, 22.0, 2.0)
    assert pace.seconds(2, 100, 10) == pytest.approx(22, rel=1e-3)
    assert expected_end(10.0, 5.0, 12.0) == 15
    assert expected_end(10.0, 5.0, 40.0) == 40.5  # late, and nobody knows by how much


# --- what is promised --------------------------------------------------------------------------


def test_fewer_steps_are_computed_the_less_is_promised():
    counts = [PROMISES[quality].count(28) for quality in ("lossless", "high", "medium", "low")]
    assert counts == [28, 18, 14, 10]
    drifts = [promise.drift(28) for promise in PROMISES.values()]
    assert drifts == sorted(drifts) and drifts[0] == 0
    assert PROMISES["low"].count(50) == 18
    # Of a few steps none is left out, so nothing drifts.
    assert PROMISES["low"].count(4) == 4 and PROMISES["low"].drift(4) == 0


def test_an_operators_schedule_takes_the_place_of_a_promise(tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"policy": "rotate", "sync_steps": [0, 2, 5], "compute": "xx.x"}))
    tuned = promises_of({"medium": file})["medium"]
    assert tuned.settings == {"policy": "rotate", "sync_steps": [0, 2, 5]}
    assert tuned.compute(4) == "xx.x"
    assert tuned.count(28) == 21  # as large a share
    assert tuned.drift(4) is None  # nobody measured it here
    for name in ("lossless", "best"):
        with pytest.raises(ValueError, match="choose one of high, medium, low"):
            promises_of({name: file})
    file.write_text('{"policy": "gather", "sync": "recompute"}')
    with pytest.raises(ValueError, match="sync steps only"):
        promises_of({"low": file})
