"""The Beam graph of a build or of a step of a curation. It has the same few steps for any number of rows."""

import apache_beam as beam

from data_prep.builder import Settings
from data_prep.partition import BuildPartition, Job, ListPartitions, MergeGroup, PartitionStep


def add_steps(pipeline: beam.Pipeline, job: Job) -> None:
    """Add the steps of a job: list the partitions, build each, merge the facts of each group."""
    step: PartitionStep
    if isinstance(job.settings, Settings):
        step = BuildPartition(job)
    else:
        from data_prep import curate_steps

        if isinstance(job.settings, curate_steps.Grouping):
            curate_steps.add_grouping(pipeline, job)
            return
        step = curate_steps.ScorePartition(job)
    built = (
        pipeline
        | "begin" >> beam.Create([None])
        | "list partitions" >> beam.ParDo(ListPartitions(job))
        | "spread" >> beam.Reshuffle()
        | "build" >> beam.ParDo(step)
    )
    if job.step != "build":
        _ = built | "group" >> beam.GroupByKey() | "merge" >> beam.ParDo(MergeGroup(job))
