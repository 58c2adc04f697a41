"""The Beam graph of a build. It has the same few steps for any number of rows."""

import apache_beam as beam

from data_prep.partition import BuildPartition, Job, ListPartitions, MergeGroup


def add_steps(pipeline: beam.Pipeline, job: Job) -> None:
    """Add the steps of a job: list the partitions, build each, merge the facts of each group."""
    built = (
        pipeline
        | "begin" >> beam.Create([None])
        | "list partitions" >> beam.ParDo(ListPartitions(job))
        | "spread" >> beam.Reshuffle()
        | "build" >> beam.ParDo(BuildPartition(job))
    )
    if job.step != "build":
        _ = built | "group" >> beam.GroupByKey() | "merge" >> beam.ParDo(MergeGroup(job))
