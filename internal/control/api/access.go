package api

import (
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
)

// rule says who may call a method.
type rule struct {
	admin bool   // root and the daemon's own user only
	try   string // what others are told to type
}

var everyone = rule{}

func admin(try string) rule { return rule{admin: true, try: try} }

// access is who may call what. Methods that are not here are refused to all.
var access = map[string]rule{
	Node_Status_FullMethodName:  everyone,
	Node_Healthy_FullMethodName: everyone,
	Node_Version_FullMethodName: everyone,
	Node_Config_FullMethodName:  everyone,
	Node_Token_FullMethodName:   admin("sudo unum token"),
	Node_Leave_FullMethodName:   admin("sudo unum leave"),
	Node_Remove_FullMethodName:  admin("sudo unum remove NODE"),
	Node_Digest_FullMethodName:  admin("ask as root"),

	Record_Get_FullMethodName:    everyone, // of these and of Users the record judges who may do what
	Record_Put_FullMethodName:    everyone,
	Record_Delete_FullMethodName: everyone,
	Record_List_FullMethodName:   everyone,
	Record_Watch_FullMethodName:  everyone,
	Record_Audit_FullMethodName:  everyone,

	Users_List_FullMethodName:   everyone,
	Users_Put_FullMethodName:    everyone,
	Users_Drop_FullMethodName:   everyone,
	Users_Invite_FullMethodName: everyone,
	Users_Login_FullMethodName:  everyone,
	Users_Logout_FullMethodName: everyone,
	Users_Whoami_FullMethodName: everyone,

	Jobs_List_FullMethodName: everyone,
	Jobs_Kill_FullMethodName: everyone, // the job's node asks whose it is
	Jobs_Wait_FullMethodName: everyone,
	Jobs_Logs_FullMethodName: everyone, // as Kill
	Jobs_Why_FullMethodName:  everyone,

	grpc_reflection_v1.ServerReflection_ServerReflectionInfo_FullMethodName:      everyone,
	grpc_reflection_v1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: everyone,
}
