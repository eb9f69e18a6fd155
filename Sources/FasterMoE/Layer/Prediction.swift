extension Group {
  /// The group as numbers. All ranks call together; `refused` is why the caller knows already that it cannot be.
  package func cluster(refused: Failure? = nil) throws(Failure) -> Cluster {
    try agree(
      .clusterOfGroup,
      failure { () throws(Failure) in
        if let refused { throw refused }
        guard calibration != nil else {
          throw Failure(.stage, "nothing was measured yet: fmoe_group_calibrate comes first, or a profile")
        }
      })
    return try Cluster(Cluster.Document(places, calibration!))
  }
}
