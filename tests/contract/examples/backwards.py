"""A runner that begins with the last file."""


def map_jobs(work, jobs, progress, download):
    results = {}
    for number, job in reversed(list(enumerate(jobs))):
        results[number] = work(job, progress=progress, download=download)
        download.done(number)
    for number in range(len(jobs)):
        yield results[number]
