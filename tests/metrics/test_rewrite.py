import datetime
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kedit_lightning.metrics import (
    EditMetrics,
    HarmonicScore,
    NGramEntropy,
    PairwiseSuccess,
    RelationSpecificity,
    TargetAccuracy,
)


def test_mean_nll_decides_not_the_sum():
    metric = PairwiseSuccess("new")
    # New: two tokens of 1.0 nat; true: one token of 1.5 nats.
    metric.update(torch.tensor([0]), torch.tensor([2.0]) / 2, torch.tensor([1.5]))
    assert metric.compute()["success"].mean == 1


def test_specificity_wants_the_true_answer_and_a_tie_fails():
    metric = PairwiseSuccess("true")
    metric.update(torch.tensor([1, 1, 1]), torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0]))
    result = metric.compute()
    assert result["success"].mean == pytest.approx(1 / 3)
    expected = (math.exp(-1) - math.exp(-2)) + 0 + (math.exp(-2) - math.exp(-1))
    assert result["magnitude"].mean == pytest.approx(expected / 3, abs=1e-7)


def test_relation_specificity_compares_with_the_least_likely_token_of_the_new_target():
    metric = RelationSpecificity()
    # The reference has 2.0 nats; the new target's tokens 0.5 and 3.0: their mean would win, their maximum does not.
    metric.update(torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3.0]))
    assert metric.compute()["success"].mean == 1


def test_accuracy_over_tokens_and_whole_answers():
    metric = TargetAccuracy()
    metric.update(torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, math.nan]), torch.tensor([2.0, 2.0, math.nan]))
    result = metric.compute()
    assert (result["accuracy"].mean, result["exact"].mean) == (0.75, 0.5)
    assert (result["exact"].n, result["exact"].skipped) == (2, 1)


def test_a_case_counts_once_and_a_contradiction_is_told():
    metric = NGramEntropy()
    metric.update(torch.tensor([1, 2]), torch.tensor([1.0, 3.0]))
    metric.update(torch.tensor([2]), torch.tensor([3.0]))
    assert metric.compute()["value"] == (2.0, 1.0, pytest.approx(1.96 / math.sqrt(2)), 2, 0)
    metric.update(torch.tensor([1]), torch.tensor([5.0]))
    with pytest.warns(UserWarning, match="different values of value"):
        assert metric.compute()["value"].mean == 2.0


def test_score_is_the_mean_of_means():
    children = [PairwiseSuccess("new"), PairwiseSuccess("new")]
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    for case in range(2):
        children[0].update(torch.tensor([case]), one, two)
        children[1].update(torch.tensor([case]), *((one, two) if case else (two, one)))
    score = HarmonicScore(children).compute()
    assert score["harmonic"].mean == pytest.approx(2 / (1 / 1 + 1 / 0.5))
    assert score["arithmetic"].mean == 0.75


def test_an_empty_collection_computes_to_nothing_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EditMetrics().compute() == {}


def shard(rank, address, results):
    """Rank 0 has cases 1, 2, 3; rank 1 repeats case 1, as a padded sampler does, and has no case of generalization."""
    dist.init_process_group("gloo", address, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    metrics = EditMetrics()
    efficacy, generalization = metrics.metric("efficacy"), metrics.metric("generalization")
    better, worse = torch.tensor([0.0]), torch.tensor([9.0])
    efficacy.update(torch.tensor([1]), better, worse)
    if rank == 0:
        efficacy.update(torch.tensor([2, 3]), worse.repeat(2), better.repeat(2))
        generalization.update(torch.tensor([2, 3]), torch.tensor([0.0, 9.0]), torch.tensor([9.0, 0.0]))
    found = metrics.compute()
    after = len(efficacy.case_id), len(generalization.case_id)  # gathering is undone
    results.put((rank, found["efficacy"].mean, found["efficacy"].n, found["generalization"].mean, after))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_count_a_repeated_case_once_and_survive_an_empty_rank(tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=shard, args=(rank, f"file://{tmp_path}/meet", results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    third = pytest.approx(1 / 3)
    assert sorted(results.get(timeout=5) for _ in workers) == [(0, third, 3, 0.5, (2, 1)), (1, third, 3, 0.5, (1, 0))]
