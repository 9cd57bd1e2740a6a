"""A runner that begins with the last file."""


def map_jobs(work, jobs, progress, common):
    with common.source.download([job.shard.needs for job in jobs[::-1]], common.disk_budget) as download:
        for number, job in enumerate(jobs[::-1]):
            yield work(job, workers=common.workers or 1, progress=progress, download=download)
            download.done(number)
