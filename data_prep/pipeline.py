"""The Beam graph of a build or of a step of a curation. It has the same few steps for any number of rows."""

from collections.abc import Callable

import apache_beam as beam

from data_prep.builder import Settings
from data_prep.partition import BuildPartition, Desk, Job, ListPartitions, MergeGroup, Shards, Worker


def add_steps(pipeline: beam.Pipeline, job: Job) -> None:
    """Add the steps of a job: list the partitions, build each, merge the facts of each group."""
    make: Callable[[Desk], Worker]
    if isinstance(job.settings, Settings):
        make = Shards
    else:
        from data_prep import curate_steps

        if isinstance(job.settings, curate_steps.Grouping):
            curate_steps.add_grouping(pipeline, job)
            return
        make = curate_steps.Scores
    built = (
        pipeline
        | "begin" >> beam.Create([None])
        | "list partitions" >> beam.ParDo(ListPartitions(job))
        | "spread" >> beam.Reshuffle()
        | "build" >> beam.ParDo(BuildPartition(job, make))
    )
    if job.step != "build":
        _ = built | "group" >> beam.GroupByKey() | "merge" >> beam.ParDo(MergeGroup(job))
