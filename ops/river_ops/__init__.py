"""Operations: the launcher, embedded servers, migrations, the demo, the benchmarks and the tiny model."""
