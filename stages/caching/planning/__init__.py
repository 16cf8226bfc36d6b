"""What a build will take: a measured pilot and a cost model."""
