"""Who is in a job, and how its processes reach each other beside the data: to agree, to ask, to meet again."""
