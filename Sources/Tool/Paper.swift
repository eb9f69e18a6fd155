import ArgumentParser
struct Paper: ParsableCommand { func run() throws {} }
