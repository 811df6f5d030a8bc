"""`python -m cluster`: connect as a recipe would, check the nodes, and print what is there."""

from cluster.connect import connect

if __name__ == "__main__":
    with connect() as cluster:
        print(cluster.describe())
