"""The question put to the mapper: models, cluster, workload, and the layouts that it may choose
from."""
