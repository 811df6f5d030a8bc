"""What is asked of the mapper: models, cluster, workload, and the layouts it may choose from."""
